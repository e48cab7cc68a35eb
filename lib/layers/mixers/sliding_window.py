"""Exact softmax attention over the last few tokens, with a cache of just those."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ...kernels.common.arguments import accumulator, known
from ...kernels.common.rows import rows as rows_of
from ...kernels.common.rows import window_at, within_reach
from ...parallel.over_time import SEQUENCE, over_time, time_shards
from ...parallel.shards import state_after, tokens_before
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.rotary import positions, rotary
from .mixer import Mixer, RowArguments

SCORES = 2**21  # of a row and head at a time: 8 MB in float32


class WindowState(NamedTuple):
    """The last window - 1 keys and values [B, window - 1, H, D], and the document's length so far [B]."""

    k: Array
    v: Array
    offset: Array


class SlidingWindowAttention(Mixer):
    """Softmax attention of each token to itself and the window - 1 tokens before it, with rotary positions.

    Attributes:
      heads: divides the width; a head's share of it is even.
      window: how many tokens a token sees, itself included.
      dtype, param_dtype, out_scale: as in `Mixer`. `backend` has no use here: XLA does the work.

    Source: Longformer (arXiv 2004.05150); in Based (2402.18668) with windows of 64 to 128.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.SlidingWindowAttention(heads=2, window=4)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.k.shape
        ((1, 7, 16), (1, 3, 2, 8))
    """

    heads: int = 4
    window: int = 64

    @nn.compact
    def mix(self, x: Array, state: WindowState | None, rows: RowArguments) -> tuple[Array, WindowState]:
        B, T, D = x.shape
        H, W = self.heads, self.window
        N = head_size("width", D, H)
        if W < 1:
            raise ValueError(f"window: got {W}; expected a number of tokens >= 1")
        q, k, v = (split_heads(y, H) for y in self.dense_parts(x, (D, D, D), "qkv"))
        before = None if state is None else state.offset
        place, offset = positions(before, shape=(B, T), **rows)
        q, k = rotary(q, place), rotary(k, place)

        if state is None:
            past_k = past_v = jnp.zeros((B, W - 1, H, N), x.dtype)
        else:
            past_k, past_v = state.k.astype(x.dtype), state.v.astype(x.dtype)
        read = rows_of((B, T), **rows)
        if time_shards() > 1:
            names = {"q": "b t h d", "k": "b t h d", "v": "b t h d", "place": "b t"}
            names |= dict.fromkeys(("past_k", "past_v"), "b w h d")
            shards = {"q": q, "k": k, "v": v, "place": place, "past_k": past_k, "past_v": past_v}
            attend = functools.partial(over_time, _attend_to_shards)
            if read is None:
                of_last = "b w h d"
                o, last_k, last_v = attend(names, ("b t h d", of_last, of_last))(**shards)
            else:
                of_each, found = "b places w h d", []

                def states_at(places: Array) -> tuple[Array, Array]:
                    run = attend(names | {"places": "b places"}, ("b t h d", of_each, of_each))
                    o, *last = run(**shards, places=places)
                    found.append(o)
                    return tuple(last)

                last_k, last_v = read.states_by_place(None, states_at)
                o = found[0]
        else:
            k, v = jnp.concatenate([past_k, k], axis=1), jnp.concatenate([past_v, v], axis=1)
            o = window_attention(q, k, v, place)
            last_k, last_v = k[:, T:], v[:, T:]
            if read is not None:
                last_k, last_v = read.states_by_place(
                    (last_k, last_v), lambda at: tuple(window_at(y, W - 1, place, at) for y in (k, v))
                )
        if read is None and rows["segment_ids"] is not None and T != 1:  # keep the last token's document
            last_k, last_v = (within_reach(y, offset - 1) for y in (last_k, last_v))
        return self.output(merge_heads(o), D), WindowState(last_k, last_v, offset)


def _attend_to_shards(q, k, v, place, past_k, past_v, places=None) -> tuple[Array, Array, Array]:
    """One shard of time: its outputs, and the last keys and values of all, or those up to some places."""
    T, before = q.shape[1], past_k.shape[1]
    k, v = (
        jnp.concatenate([tokens_before(x, before, past, SEQUENCE), x], axis=1)
        for x, past in ((k, past_k), (v, past_v))
    )
    up_to = lambda at: tuple(window_at(x, before, place, at) for x in (k, v))  # noqa: E731
    last_k, last_v = state_after((k[:, T:], v[:, T:]), up_to, places, T, SEQUENCE)
    return window_attention(q, k, v, place), last_k, last_v


def window_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    place: Int[Array, "b t"],
) -> Float[Array, "b t h d"]:
    """Each query's attention to its own key and those before it, within its window and its document.

    Args:
      q: queries of T tokens.
      k, v: keys and values of the window - 1 tokens before the first query, then of the T tokens.
      place: each query's place in its document: no query sees further back than that.

    The work is O(T * window): a call of at most one window sees its keys once, and in a longer one the
    queries of each window see two windows of keys. Of the scores, `SCORES` are there at a time, in the
    backward pass too, which computes them again. A token that is not finite, such as NaN, spoils the queries
    that see it, and no other.
    """
    B, T, H, D = q.shape
    W = k.shape[1] - T + 1
    if T == 1:  # one token sees all there is
        return _attend((q, place, None, k, v, None), W)
    (q, of_q), (k, of_k), (v, of_v) = map(_contained, (q, k, v))
    of_k = of_k + of_v
    if known(T) and T <= W:
        return _attend((q, place, of_q, k, v, of_k), W)
    blocks = -(-T // W)
    tail = blocks * W - T

    def in_blocks(x):
        x = jnp.pad(x, ((0, 0), (0, tail), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(B, blocks, W, *x.shape[2:])

    def two_blocks(x):  # one key more in front makes the keys a whole number of blocks
        x = jnp.pad(x, ((0, 0), (1, tail), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(B, blocks + 1, W, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    parts = (*map(in_blocks, (q, place, of_q)), *map(two_blocks, (k, v, of_k)))
    attend = jax.vmap(functools.partial(_attend, window=W), 1, 1)
    group = max(1, SCORES // (2 * W * W))  # blocks at a time
    if not known(T) or blocks <= group:
        o = attend(parts)
    else:
        steps = -(-blocks // group)

        def by_step(x):
            x = jnp.pad(x, ((0, 0), (0, steps * group - blocks), *((0, 0),) * (x.ndim - 2)))
            return jnp.moveaxis(x.reshape(B, steps, group, *x.shape[2:]), 1, 0)

        o = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), jax.tree.map(by_step, parts))
        o = jnp.moveaxis(o, 0, 1).reshape(B, steps * group, W, H, D)[:, :blocks]
    return o.reshape(B, -1, H, D)[:, :T]


def _attend(part: tuple[Any, ...], window: int) -> Array:
    """Queries [B, C, H, D] and the keys up to theirs [B, S, H, D], some of the queries at a time."""
    q, place, of_q, k, v, of_k = part
    B, C, S = q.shape[0], q.shape[1], k.shape[1]
    if not known(C) or C * S <= SCORES:
        return _scored(q, place, of_q, k, v, of_k, window)
    few = max(SCORES // S, 1)
    few = few // 128 * 128 or few
    steps = -(-C // few)
    behind = steps * few - C

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, behind), *((0, 0),) * (x.ndim - 2)))

    def by_step(x):
        return jnp.moveaxis(padded(x).reshape(B, steps, few, *x.shape[2:]), 1, 0)

    keys = [padded(x)[:, S - C - (window - 1) :] for x in (k, v, of_k)]

    def step(at):
        number, *own = at
        near = (jax.lax.dynamic_slice_in_dim(x, number * few, few + window - 1, axis=1) for x in keys)
        return _scored(*own, *near, window)

    xs = jnp.arange(steps), *map(by_step, (q, place, of_q))
    o = jax.lax.map(jax.checkpoint(step, prevent_cse=False), xs)
    return jnp.moveaxis(o, 0, 1).reshape(B, steps * few, *q.shape[2:])[:, :C]


def _scored(q, place, of_q, k, v, of_k, window: int) -> Array:
    """Queries [B, C, H, D] and the keys up to theirs [B, S, H, D], all scores at once."""
    C, S, dtype = q.shape[1], k.shape[1], accumulator(q.dtype)
    # How far back from query i key j lies, and how far back the query sees: [B, H, queries, keys].
    back = (jnp.arange(C)[:, None] + (S - C) - jnp.arange(S)[None, :])[None, None]
    mask = (back >= 0) & (back <= jnp.minimum(place, window - 1)[:, None, :, None])
    score = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    if of_q is not None and of_k is not None:
        score = score + jnp.moveaxis(of_q, -1, 1)[..., None] + jnp.moveaxis(of_k, -1, 1)[..., None, :]
    score = jnp.where(mask, score, -jnp.inf)
    weight = jnp.exp(score - jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True)))
    weight = jnp.where(mask, weight, 0)
    weight = jnp.where(mask, weight / jnp.sum(weight, axis=-1, keepdims=True), 0)
    o = jnp.einsum("bhqk,bkhd->bqhd", weight.astype(v.dtype), v, preferred_element_type=dtype)
    return o.astype(q.dtype)


def _contained(x: Array) -> tuple[Array, Array]:
    """x [..., D] with zeros where it is not finite, and NaN for each such vector, 0 for others [...]."""
    finite = jnp.isfinite(x)
    spoiled = jnp.where(jnp.all(finite, axis=-1), 0, jnp.nan)
    return jnp.where(finite, x, 0), spoiled.astype(accumulator(x.dtype))
