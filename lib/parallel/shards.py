"""Exchanges between shards of time inside `jax.shard_map`: the state or the tokens before a shard."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..kernels.common.documents import documents
from ..kernels.common.sharding import vary_like


def entering_state(
    total: Array,
    left: Array,
    initial_state: Array | None,
    segment_ids: Array | None,
    axis_name: str,
    *,
    logs: bool = False,
) -> Array:
    """The state before this shard, from every shard's (decay, state left) and where documents end.

    Args:
      total: what a shard multiplies the state by, or if `logs` its log; it broadcasts to the state's shape.
      left: the state that its tokens leave if none entered, [B, ...].
      initial_state: the state before the first shard, the same on every shard; None: zeros.
      segment_ids: one shard [B, T].
      axis_name: the manual mesh axis; shards are in the order of time.
    """
    if logs:
        return passed_on(
            lambda g, S: jnp.exp(g) * S, jnp.add, total, left, initial_state, segment_ids, axis_name
        )
    return passed_on(faded, _joined, total, left, initial_state, segment_ids, axis_name)


def faded(decay: Array, state: Array) -> Array:
    """decay * state: nothing of a state of zero, though a product of decays be infinite."""
    return _unless_zero(decay, state) * state


def _joined(decay: Array, other: Array) -> Array:
    return _unless_zero(decay, other) * _unless_zero(other, decay)


def _unless_zero(factor: Array, other: Array) -> Array:
    return jnp.where((other == 0) & jnp.isinf(factor), 0, factor)


def passed_on(
    fade: Callable[[Any, Array], Array],
    joined: Callable[[Any, Any], Any],
    decay: Any,
    left: Array,
    initial_state: Array | None,
    segment_ids: Array | None,
    axis_name: str,
) -> Array:
    """The state before this shard, where a shard's tokens make fade(decay, state) + left of what enters.

    A scan by doubling: after k steps a shard knows what the last 2^k shards leave. Of P shards each sends
    1 + ceil(log2(P - 1)) states; a gather would bring it P - 1, and a state may be many tokens large.

    Args:
      fade: (decay, state) -> state.
      joined: the decays of two stretches of time, in either order -> that of both.
      decay: of this shard; a numpy array is of any shard, and is not sent.
      left, initial_state, segment_ids, axis_name: as in `entering_state`.

    Source: Hillis and Steele 1986 (Data parallel algorithms).
    """
    shards, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def from_left(tree, distance):  # the first shards receive zeros
        right = [(i, i + distance) for i in range(shards - distance)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, right), tree)

    over = lambda mask: mask.reshape(*mask.shape, *[1] * (left.ndim - mask.ndim))  # noqa: E731
    first = jnp.zeros_like(left) if initial_state is None else initial_state.astype(left.dtype)
    goes_on = None  # bool [B]: no document starts in this shard
    if segment_ids is not None:
        starts_here = (from_left(segment_ids[:, -1], 1) != segment_ids[:, 0]) & (here > 0)
        inside = documents(segment_ids, *segment_ids.shape).index[:, -1]
        goes_on = ~starts_here & (inside == 0)
    only = lambda x: x if goes_on is None else jnp.where(over(goes_on), x, 0)  # noqa: E731
    state = left
    if initial_state is not None:
        state = left + jnp.where(here == 0, only(fade(decay, first)), 0)
    distance = 1
    while distance < shards - 1:
        sent = from_left(decay, distance) if isinstance(decay, Array) else decay
        state = state + only(fade(decay, from_left(state, distance)))
        decay = joined(decay, sent)
        goes_on = None if goes_on is None else goes_on & from_left(goes_on, distance)
        distance *= 2
    entering = jnp.where(here == 0, first, from_left(state, 1))
    return entering if segment_ids is None else jnp.where(over(starts_here), 0, entering)


def tokens_before(x: Array, count: int, first: Array | None, axis_name: str) -> Array:
    """The `count` tokens before this shard [B, count, ...], from as many shards as they lie in.

    Args:
      x: one shard of time [B, T, ...].
      count: how many.
      first: those before the first shard [B, count, ...], the same on every shard; None: zeros.
      axis_name: the manual mesh axis; shards are in the order of time.
    """
    T, shards, here = x.shape[1], jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    pieces: list[Array] = []
    for back in range(1, min(-(-count // T), shards - 1) + 1):
        right = [(i, i + back) for i in range(shards - back)]  # the first shards receive zeros
        wanted = min(count - (back - 1) * T, T)
        pieces.insert(0, jax.lax.ppermute(x[:, T - wanted :], axis_name, right))
    there = sum(piece.shape[1] for piece in pieces)
    missing = jnp.zeros((x.shape[0], count - there, *x.shape[2:]), x.dtype)
    before = jnp.concatenate([vary_like(missing, x), *pieces], axis=1)
    if first is None:
        return before
    # Of `first`, what is left when `here` shards have come after it.
    padded = jnp.concatenate([first.astype(x.dtype), jnp.zeros_like(first, x.dtype)], axis=1)
    start = jnp.minimum(here * T, count)
    earlier = jax.lax.dynamic_slice_in_dim(vary_like(padded, x), start, count, axis=1)
    is_earlier = jnp.arange(count) < count - start
    return jnp.where(is_earlier.reshape(1, count, *[1] * (x.ndim - 2)), earlier, before)


def of_last_shard(x: Array, axis_name: str) -> Array:
    """The last shard's x, on every shard."""
    last = jax.lax.axis_index(axis_name) == jax.lax.axis_size(axis_name) - 1
    return jax.lax.psum(jnp.where(last, x, 0), axis_name)


def state_after(
    last: Any, at: Callable[[Array], Any], places: Array | None, tokens: int, axis_name: str
) -> Any:
    """The state after the last shard's tokens, or those after some tokens; the same on every shard.

    Args:
      last: the state, an array or a tree of them, that this shard's tokens leave.
      at: places in this shard [B, N] -> the states after them [B, N, ...]; -1 is the state before the first.
      places: in the whole row [B, N]; -1 is the state before the first shard. None: `last` of the last shard.
      tokens: of a shard.
      axis_name: the manual mesh axis; shards are in the order of time.
    """
    if places is None:
        return jax.tree.map(lambda x: of_last_shard(x, axis_name), last)
    here = jax.lax.axis_index(axis_name)
    local = places - here * tokens
    is_here = ((local >= 0) & (local < tokens)) | ((places < 0) & (here == 0))

    def from_its_shard(x: Array) -> Array:
        mine = is_here.reshape(*is_here.shape, *[1] * (x.ndim - 2))
        return jax.lax.psum(jnp.where(mine, x, 0), axis_name)

    return jax.tree.map(from_its_shard, at(jnp.clip(local, -1, tokens - 1)))
