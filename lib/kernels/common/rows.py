"""Rows of tokens that are padded, packed or reversed, and the states at their ends."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify

from .arguments import as_shaped, known, reject
from .documents import check_segment_ids, documents


@dataclass(frozen=True)
class Rows:
    """Rows [B, T] that are not simply read from their first token to their last.

    "As read" is said of arrays in reading order: tokens past a row's end stand last, either way.

    Attributes:
      shape: (B, T).
      segment_ids: as an operation takes them [B, T], or None.
      lengths: how many tokens of each row are real [B]; None means all.
      segment_states: how many documents a row's states are returned of; None means the row's last state.
      reverse: rows are read from their last real token to their first.
    """

    shape: tuple[int, int]
    segment_ids: Array | None
    lengths: Array | None
    segment_states: int | None
    reverse: bool

    def read(self, x: Array, past_end: int | float = 0) -> Array:
        """x [B, T, ...] as read, with `past_end` in place of whatever stands past the end of a row."""
        return self._within(self._turn(x), past_end)

    def write(self, y: Array) -> Array:
        """An output as read [B, T, ...] in the caller's order, with zeros past the end of a row."""
        return self._turn(self._within(y, 0))

    def states(self, last: Any, at: Callable[[Array], Any]) -> Any:
        """The state to return: `last`, or those at the documents' ends, every leaf [B, N, ...].

        Args:
          last: the state after the last real token.
          at: returns the states after the tokens [B, N], by place as read; -1 is the initial state.
        """
        if self.segment_states is None:
            return last
        ends, present = self._ends
        return jax.tree.map(lambda x: jnp.where(_like(present, x), x, 0), at(ends))

    def states_by_place(self, last: Any, at: Callable[[Array], Any]) -> Any:
        """As `states`, where `last` is the state after the last token, real or not."""
        if self.segment_states is None and self.lengths is not None:
            last = jax.tree.map(lambda x: x[:, 0], at(self.lengths[:, None] - 1))
        return self.states(last, at)

    @cached_property
    def ids(self) -> Array | None:
        """The segment ids as read; those past a row's end are its last token's."""
        if self.segment_ids is None or not (self.reverse or self.lengths is not None):
            return self.segment_ids
        ids = self._turn(self.segment_ids)
        if self.lengths is None:
            return ids
        last = jnp.take_along_axis(ids, jnp.maximum(self.lengths - 1, 0)[:, None], axis=1)
        return jnp.where(self._real, ids, last)

    @property
    def _real(self) -> Array:
        """bool [B, T], as read and as given: the token lies before its row's end."""
        assert self.lengths is not None
        return jnp.arange(self.shape[1])[None] < self.lengths[:, None]

    @property
    def _ends(self) -> tuple[Array, Array]:
        """The places of the documents' last tokens as read [B, N], and which of the N documents exist."""
        B, T = self.shape
        packed = documents(self.ids, B, T)
        index = jnp.zeros((B, T), jnp.int32) if packed is None else packed.index
        last_B1 = index[:, -1:]
        n = jnp.arange(self.segment_states)[None]
        wanted = last_B1 - n if self.reverse else jnp.broadcast_to(n, (B, n.shape[1]))
        is_read = jnp.ones((B, T), bool) if self.lengths is None else self._real
        up_to = is_read[:, None] & (index[:, None] <= wanted[..., None])
        return jnp.sum(up_to, axis=2, dtype=jnp.int32) - 1, n <= last_B1

    def _turn(self, x: Array) -> Array:
        """Change x [B, T, ...] from the order given to that of reading, or back."""
        if not self.reverse:
            return x
        if self.lengths is None:
            return jnp.flip(x, axis=1)
        t = jnp.arange(self.shape[1])[None]
        from_ = jnp.where(self._real, self.lengths[:, None] - 1 - t, t)
        return jnp.take_along_axis(x, _like(from_, x), axis=1)

    def _within(self, x: Array, past_end: int | float) -> Array:
        if self.lengths is None:
            return x
        return jnp.where(_like(self._real, x), x, jnp.asarray(past_end, x.dtype))


class RowArguments(TypedDict):
    """The arguments of an operation that describe its rows: `linear_attention(..., **rows)`."""

    segment_ids: Array | None
    lengths: Array | None
    segment_states: int | None


def rows(
    shape: tuple[int, ...],
    segment_ids: Any,
    lengths: Any = None,
    segment_states: int | None = None,
    reverse: bool = False,
) -> Rows | None:
    """Describe the reading of rows [B, T]; None if it is from their first token to their last.

    Raises:
      ValueError: naming the argument that can't be right.

    Example:
        >>> import jax.numpy as jnp
        >>> read = rows((1, 5), None, lengths=jnp.array([3]), reverse=True)
        >>> x = jnp.array([[1, 2, 3, 8, 9]])
        >>> read.read(x).tolist(), read.write(jnp.array([[3, 2, 1, 7, 7]])).tolist()
        ([[3, 2, 1, 0, 0]], [[1, 2, 3, 0, 0]])
    """
    B, T = shape
    segment_ids, lengths = as_shaped(segment_ids), as_shaped(lengths)
    check_segment_ids(segment_ids, (B, T))
    if lengths is not None:
        if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
            reject("lengths", lengths, f"integers [{B}]")
        if not isinstance(lengths, jax.core.Tracer) and lengths.is_fully_addressable and known(T):
            numbers = np.asarray(lengths)
            if (numbers < 0).any() or (numbers > T).any():
                raise ValueError(f"lengths: got {numbers.tolist()}; expected 0 to {T}, the row's length")
        lengths = lengths.astype(jnp.int32)
        right = jnp.all((lengths >= 0) & (lengths <= T))
        checkify.debug_check(right, "lengths: a value is not in [0, T]; expected 0 to the row's length")
    if segment_states is not None and (isinstance(segment_states, bool) or int(segment_states) < 1):
        raise ValueError(f"segment_states: got {segment_states}; expected None or a number of documents >= 1")
    if lengths is None and segment_states is None and not reverse:
        return None
    return Rows((B, T), segment_ids, lengths, segment_states, bool(reverse))


def states_at(
    step: Callable[[Any, Any], Any], state: Any, tokens: Any, places: Array, chunk: int = 32
) -> Any:
    """The states after some of a row's tokens, by a loop that keeps one state a chunk for its gradient.

    Args:
      step: (state, token) -> state; every leaf of a state is [B, ...].
      state: the state before the first token.
      tokens: a tree of arrays [T, B, ...].
      places: int [B, N] in [-1, T); -1 is the state before the first token.

    Returns:
      The states [B, N, ...].
    """
    T = jax.tree.leaves(tokens)[0].shape[0]
    chunk = min(chunk, T)
    padded = jax.tree.map(lambda x: jnp.pad(x, ((0, -T % chunk), *((0, 0),) * (x.ndim - 1))), tokens)
    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), padded)

    def keep(state, token):
        state = step(state, token)
        return state, state

    @jax.checkpoint
    def one(carry, this):
        state, found = carry
        first, tokens = this
        state, states = jax.lax.scan(keep, state, tokens)
        at = places - first
        here = (at >= 0) & (at < chunk)
        picked = jax.tree.map(lambda x: _pick(jnp.moveaxis(x, 0, 1), jnp.clip(at, 0, chunk - 1)), states)
        return (state, jax.tree.map(lambda x, f: jnp.where(_like(here, x), x, f), picked, found)), None

    found = jax.tree.map(lambda x: jnp.repeat(x[:, None], places.shape[1], axis=1), state)
    firsts = jnp.arange(0, T, chunk, dtype=places.dtype)
    (_, found), _ = jax.lax.scan(one, (state, found), (firsts, chunks))
    return found


def outputs_at(h: Array, initial: Array | None, places: Array) -> Array:
    """h [B, T, ...] after some tokens [B, N, ...]; -1 is `initial`, or zeros."""
    picked = _pick(h, jnp.maximum(places, 0))
    first = jnp.zeros((), h.dtype) if initial is None else initial[:, None].astype(h.dtype)
    return jnp.where(_like(places >= 0, picked), picked, first)


def last_output(
    h: Array,
    initial: Array | None,
    *,
    segment_ids: Array | None,
    lengths: Array | None,
    segment_states: int | None,
) -> Array:
    """h [B, T, ...] at each row's last real token or its documents' last; `initial` where there is none."""
    read = rows(h.shape[:2], segment_ids, lengths, segment_states)
    last = h[:, -1]
    return last if read is None else read.states_by_place(last, lambda at: outputs_at(h, initial, at))


def window_at(history: Array, width: int, reach: Array | None, places: Array) -> Array:
    """The last `width` inputs up to some tokens [B, N, width, ...], zeros for those of earlier documents.

    Args:
      history: the `width` inputs before the call, then the call's [B, width + T, ...].
      width: how many.
      reach: how many tokens of its document precede a token [B, T]; None means `width` or more.
      places: int [B, N] in [-1, T); -1 is before the first token.
    """
    B, N = places.shape
    # Token t stands at t + width.
    at = (places[..., None] + jnp.arange(1, width + 1)[None, None]).reshape(B, N * width)
    last = _pick(history, at).reshape(B, N, width, *history.shape[2:])
    if reach is None:
        return last
    return within_reach(last, jnp.where(places < 0, width, _pick(reach, jnp.maximum(places, 0))))


def within_reach(last: Array, reach: Array) -> Array:
    """The last inputs up to a token [B, ..., width, ...], zeros for those further back than `reach` [B, ...].

    Example:
        >>> import jax.numpy as jnp
        >>> within_reach(jnp.array([[[5.0], [6.0], [7.0]]]), jnp.array([1])).ravel().tolist()
        [0.0, 6.0, 7.0]
    """
    axis = reach.ndim
    back = jnp.arange(last.shape[axis] - 1, -1, -1).reshape(*[1] * axis, -1)
    within = back <= reach[..., None]
    return jnp.where(within.reshape(*within.shape, *[1] * (last.ndim - within.ndim)), last, 0)


def _pick(x: Array, places: Array) -> Array:
    """x [B, T, ...] at places [B, N]."""
    return jnp.take_along_axis(x, _like(places, x), axis=1)


def _like(x: Array, y: Array) -> Array:
    """x [B, T] with as many axes as y."""
    return x.reshape(*x.shape, *[1] * (y.ndim - 2))
