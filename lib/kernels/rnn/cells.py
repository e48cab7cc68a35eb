"""The cells: how many gates and states each has, and one step, which all backends and gradients use."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Of the sLSTM before its first token, which m, the log of a scale, would be minus infinity.
NOTHING_YET = -1e30


class Cell(NamedTuple):
    """A cell without its matrices. Gate g adds W x to pre-activation inputs[g], R h + b to recurrent[g]."""

    inputs: tuple[int, ...]
    recurrent: tuple[int, ...]
    states: tuple[str, ...]  # h first
    reads: tuple[int, ...]  # the states, by number, that `step` takes
    # (pre-activations, reads) -> states
    step: Callable[[Sequence[Array], Sequence[Array]], tuple[Array, ...]]
    # (pre-activations, reads, states' cotangents) -> those of (pre-activations, reads)
    pullback: Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]]

    @property
    def gates(self) -> int:
        return len(self.inputs)

    @property
    def pre_activations(self) -> int:
        return 1 + max(self.inputs + self.recurrent)

    def combine(self, x: Sequence[Array], r: Sequence[Array]) -> list[Array]:
        """The pre-activations, from each gate's W x and R h + b."""
        given = dict(zip(self.inputs, x, strict=True))
        return self.add([given.get(place) for place in range(self.pre_activations)], r)

    def add(self, pre: Sequence[Array | None], r: Sequence[Array]) -> list[Array]:
        """The pre-activations with R h added."""
        found: list[Any] = list(pre)
        for place, y in zip(self.recurrent, r, strict=True):
            found[place] = y if found[place] is None else found[place] + y
        return found


def _lstm(pre, reads):
    i, f, z, o = pre
    (c,) = reads
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(z)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _lstm_pullback(pre, reads, dstates):
    i, f, z, o = (jnp.tanh(y) if g == 2 else jax.nn.sigmoid(y) for g, y in enumerate(pre))
    (c,) = reads
    dh, dc = dstates
    tanh_c = jnp.tanh(f * c + i * z)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    dpre = dc * z * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - z * z), dh * tanh_c * o * (1 - o)
    return dpre, (dc * f,)


def _gru(pre, reads):
    r, z, n, recurrent_n = pre
    (h,) = reads
    n = jnp.tanh(n + jax.nn.sigmoid(r) * recurrent_n)
    z = jax.nn.sigmoid(z)
    return (z * h + (1 - z) * n,)


def _gru_pullback(pre, reads, dstates):
    r, z = jax.nn.sigmoid(pre[0]), jax.nn.sigmoid(pre[1])
    n = jnp.tanh(pre[2] + r * pre[3])
    (h,), (dh,) = reads, dstates
    dn = dh * (1 - z) * (1 - n * n)
    return (dn * pre[3] * r * (1 - r), dh * (h - n) * z * (1 - z), dn, dn * r), (dh * z,)


def _elman(pre, reads):
    return (jnp.tanh(pre[0]),)


def _elman_pullback(pre, reads, dstates):
    h = jnp.tanh(pre[0])
    return (dstates[0] * (1 - h * h),), ()


def _slstm(pre, reads):
    i, f, z, o = pre
    c, n, m = reads
    kept = jnp.where(n == 0, NOTHING_YET, m + log_sigmoid(f))  # n >= 1 once a token was read
    m = jnp.maximum(i, kept)
    i, f = jnp.exp(i - m), jnp.exp(kept - m)
    c = f * c + i * jnp.tanh(z)
    n = f * n + i
    return jax.nn.sigmoid(o) * c / n, c, n, m


def _slstm_pullback(pre, reads, dstates):
    i, f, z, o = pre
    c, n, m = reads
    dh, dc, dn, dm = dstates
    kept = jnp.where(n == 0, NOTHING_YET, m + log_sigmoid(f))
    z, o = jnp.tanh(z), jax.nn.sigmoid(o)
    of_i = i >= kept  # what m is
    m = jnp.maximum(i, kept)
    i, kept = jnp.exp(i - m), jnp.exp(kept - m)
    new_n = kept * n + i
    h = (kept * c + i * z) / new_n
    dc = dc + dh * o / new_n
    dn = dn - dh * o * h / new_n
    di, dkept = i * (dc * z + dn), kept * (dc * c + dn * n)
    dm = dm - di - dkept
    di = di + jnp.where(of_i, dm, 0)
    dkept = dkept + jnp.where(of_i, 0, dm)
    dpre = di, dkept * jax.nn.sigmoid(-f), dc * i * (1 - z * z), dh * h * o * (1 - o)
    return dpre, (dc * kept, dn * kept, dkept)


def log_sigmoid(x: Array) -> Array:
    """log(sigmoid(x)) in operations that every kernel language has: not log1p, whose digits m rounds off."""
    return jnp.minimum(x, 0) - jnp.log(1 + jnp.exp(-jnp.abs(x)))


CELLS = {
    "lstm": Cell((0, 1, 2, 3), (0, 1, 2, 3), ("h", "c"), (1,), _lstm, _lstm_pullback),
    "gru": Cell((0, 1, 2), (0, 1, 3), ("h",), (0,), _gru, _gru_pullback),
    "elman": Cell((0,), (0,), ("h",), (), _elman, _elman_pullback),
    "slstm": Cell((0, 1, 2, 3), (0, 1, 2, 3), ("h", "c", "n", "m"), (1, 2, 3), _slstm, _slstm_pullback),
}


def find(name: str) -> Cell:
    """The cell of that name. Raises ValueError if there is none."""
    if name not in CELLS:
        raise ValueError(f"cell: got {name!r}; expected one of {', '.join(map(repr, CELLS))}")
    return CELLS[name]
