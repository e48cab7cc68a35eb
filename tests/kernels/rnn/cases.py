"""The calls that every backend is tried on."""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from tests.seeds import generator

from . import definition

FLOATS = ("gates", "recurrent", "bias", "initial_state")


@dataclass(frozen=True)
class Case:
    cell: str
    B: int
    T: int
    H: int
    D: int
    bias: bool = True
    state: bool = False
    packed: bool = False
    dtype: str = "float32"

    def __str__(self):
        flags = [name for name in ("bias", "state", "packed") if getattr(self, name)]
        return "-".join(
            [self.cell, f"B{self.B}", f"T{self.T}", f"H{self.H}", f"D{self.D}", *flags, self.dtype]
        )

    def arguments(self) -> dict:
        """Random arguments in the case's dtype, as numpy arrays: the same at every call."""
        rng = generator(zlib.crc32(str(self).encode()))
        dtype = jnp.dtype(self.dtype)
        _, G, S = definition.CELLS[self.cell]
        args = {
            "gates": rng.standard_normal((self.B, self.T, self.H, G, self.D)).astype(dtype),
            "recurrent": (0.7 * rng.standard_normal((self.H, G, self.D, self.D)) / self.D**0.5).astype(dtype),
        }
        if self.bias:
            args["bias"] = rng.standard_normal((self.H, G, self.D)).astype(dtype)
        if self.state:
            state = rng.standard_normal((self.B, S, self.H, self.D))
            if self.cell == "slstm":
                state[:, 2] = 1 + np.abs(state[:, 2])
            args["initial_state"] = state.astype(np.float64 if self.dtype == "float64" else np.float32)
        if self.packed:
            starts = rng.random((self.B, self.T)) < 4 / self.T
            args["segment_ids"] = np.cumsum(starts, axis=1).astype(np.int32) % 3  # an id may come back later
        return args


def split(arguments: dict) -> tuple[dict, dict]:
    """(the floats, the rest), as jax arrays."""
    arrays = {n: jnp.asarray(x) for n, x in arguments.items()}
    floats = {n: x for n, x in arrays.items() if n in FLOATS}
    return floats, {n: x for n, x in arrays.items() if n not in FLOATS}


def cotangents(h, state):
    rng = np.random.default_rng(7)
    return tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in (h, state))


def value_and_gradients(case: Case, arguments: dict, backend: str | None):
    """(h, state) and the gradient of every float argument, for fixed random cotangents."""
    floats, rest = split(arguments)

    @jax.jit
    def run(floats):
        def call(floats):
            return frugax.kernels.rnn(**floats, **rest, cell=case.cell, backend=backend)

        out, pullback = jax.vjp(call, floats)
        return out, pullback(cotangents(*out))[0]

    return run(floats)


def wide(arguments: dict) -> dict:
    """The same numbers in float64."""
    return {n: np.asarray(x, np.float64) if n in FLOATS else x for n, x in arguments.items()}
