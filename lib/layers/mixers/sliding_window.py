"""Exact softmax attention over the last few tokens, with a cache of just those."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ...kernels.common.arguments import accumulator
from ...kernels.common.rows import rows as rows_of
from ...kernels.common.rows import window_at
from ...parallel.over_time import SEQUENCE, check_whole_rows, over_time, time_shards
from ...parallel.shards import of_last_shard, tokens_before
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.rotary import positions, rotary
from .mixer import Mixer, RowArguments


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
            check_whole_rows(lengths=rows["lengths"], segment_states=rows["segment_states"])
            names = {"q": "b t h d", "k": "b t h d", "v": "b t h d", "place": "b t"}
            names |= dict.fromkeys(("past_k", "past_v"), "b w h d")
            attend = over_time(_attend_to_shards, names, ("b t h d", "b w h d", "b w h d"))
            o, last_k, last_v = attend(q=q, k=k, v=v, place=place, past_k=past_k, past_v=past_v)
        else:
            k, v = jnp.concatenate([past_k, k], axis=1), jnp.concatenate([past_v, v], axis=1)
            o = window_attention(q, k, v, place)
            last_k, last_v = k[:, T:], v[:, T:]
        if read is not None:
            last_k, last_v = read.states_by_place(
                (last_k, last_v), lambda at: tuple(window_at(y, W - 1, place, at) for y in (k, v))
            )
        elif rows["segment_ids"] is not None and T != 1:  # keep what is of the last token's document
            back = jnp.arange(W - 2, -1, -1)[None, :]
            keep = (back < offset[:, None])[..., None, None]
            last_k, last_v = jnp.where(keep, last_k, 0), jnp.where(keep, last_v, 0)
        return self.output(merge_heads(o), D), WindowState(last_k, last_v, offset)


def _attend_to_shards(q, k, v, place, past_k, past_v) -> tuple[Array, Array, Array]:
    """One shard of time: its outputs, and the last keys and values of all; the window's start is sent."""
    T, before = q.shape[1], past_k.shape[1]
    k, v = (
        jnp.concatenate([tokens_before(x, before, past, SEQUENCE), x], axis=1)
        for x, past in ((k, past_k), (v, past_v))
    )
    last_k, last_v = (of_last_shard(x[:, T:], SEQUENCE) for x in (k, v))
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

    The work and the memory are O(T * window): a call of at most one window sees its keys once, and in a
    longer one the queries of each window see two windows of keys. A token that is not finite, such as NaN,
    spoils the queries that see it, and no other.
    """
    B, T, H, D = q.shape
    W = k.shape[1] - T + 1
    dtype = accumulator(q.dtype)
    of_q: Array | None = None
    of_k: Array | None = None
    if T != 1:  # one token sees all there is
        q, of_q = _contained(q)
        (k, spoiled_k), (v, spoiled_v) = _contained(k), _contained(v)
        of_k = spoiled_k + spoiled_v
    if isinstance(T, int) and T <= W:  # T may be symbolic
        C, keys = T, W - 1 + T
        q, place, k, v = (x[:, None] for x in (q, place, k, v))
        of_q, of_k = (x if x is None else x[:, None] for x in (of_q, of_k))
    else:
        C, keys, blocks = W, 2 * W, -(-T // W)
        tail = blocks * W - T

        def in_blocks(x):
            x = jnp.pad(x, ((0, 0), (0, tail), *((0, 0),) * (x.ndim - 2)))
            return x.reshape(B, blocks, W, *x.shape[2:])

        def two_blocks(x):  # one key more in front makes the keys a whole number of blocks
            x = jnp.pad(x, ((0, 0), (1, tail), *((0, 0),) * (x.ndim - 2)))
            x = x.reshape(B, blocks + 1, W, *x.shape[2:])
            return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

        q, place, of_q = (in_blocks(x) for x in (q, place, of_q))
        k, v, of_k = (two_blocks(x) for x in (k, v, of_k))

    # How far back from query i key j lies, and how far back the query sees: [B, blocks, H, queries, keys].
    back = (jnp.arange(C)[:, None] + (keys - C) - jnp.arange(keys)[None, :])[None, None, None]
    mask = (back >= 0) & (back <= jnp.minimum(place, W - 1)[:, :, None, :, None])
    score = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k, preferred_element_type=dtype) * D**-0.5
    if of_q is not None and of_k is not None:
        score = score + jnp.moveaxis(of_q, -1, 2)[..., None] + jnp.moveaxis(of_k, -1, 2)[..., None, :]
    score = jnp.where(mask, score, -jnp.inf)
    weight = jnp.exp(score - jax.lax.stop_gradient(jnp.max(score, axis=-1, keepdims=True)))
    weight = jnp.where(mask, weight, 0)
    weight = jnp.where(mask, weight / jnp.sum(weight, axis=-1, keepdims=True), 0)
    o = jnp.einsum("bnhqk,bnkhd->bnqhd", weight.astype(v.dtype), v, preferred_element_type=dtype)
    return o.reshape(B, -1, H, D)[:, :T].astype(q.dtype)


def _contained(x: Array) -> tuple[Array, Array]:
    """x [..., D] with zeros where it is not finite, and NaN for each such vector, 0 for others [...]."""
    finite = jnp.isfinite(x)
    spoiled = jnp.where(jnp.all(finite, axis=-1), 0, jnp.nan)
    return jnp.where(finite, x, 0), spoiled.astype(accumulator(x.dtype))
