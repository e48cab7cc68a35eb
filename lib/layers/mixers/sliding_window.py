"""Exact softmax attention over the last few tokens, with a cache of just those."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.rotary import positions, rotary
from .mixer import Mixer


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
      dtype, param_dtype, out_scale: as in `Mixer`. `backend` has no use here: `jax.nn.dot_product_attention`
        does the work.

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
    def __call__(
        self, x: Array, *, state: WindowState | None = None, segment_ids: Array | None = None
    ) -> tuple[Array, WindowState]:
        x = self.prepare(x, segment_ids)
        B, T, D = x.shape
        H, W = self.heads, self.window
        N = head_size("width", D, H)
        if W < 1:
            raise ValueError(f"window: got {W}; expected a number of tokens >= 1")
        q, k, v = (split_heads(y, H) for y in jnp.split(self.dense(x, 3 * D, "qkv"), 3, axis=-1))
        before = None if state is None else state.offset
        place, offset = positions(before, segment_ids, (B, T))
        q, k = rotary(q, place), rotary(k, place)

        if state is None:
            past_k = past_v = jnp.zeros((B, W - 1, H, N), x.dtype)
        else:
            past_k, past_v = state.k.astype(x.dtype), state.v.astype(x.dtype)
        k, v = jnp.concatenate([past_k, k], axis=1), jnp.concatenate([past_v, v], axis=1)
        o = window_attention(q, k, v, place)
        return self.output(merge_heads(o), D), WindowState(k[:, T:], v[:, T:], offset)


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

    The work and the memory are O(T * window): queries in blocks of one window see two blocks of keys.
    """
    B, T, H, D = q.shape
    W = k.shape[1] - T + 1
    tail = -T % W
    blocks = (T + tail) // W

    def in_blocks(x):
        return x.reshape(B, -1, W, *x.shape[2:])

    def two_blocks(x):  # one key more in front makes the keys a whole number of blocks
        x = in_blocks(jnp.pad(x, ((0, 0), (1, tail), (0, 0), (0, 0))))
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2).reshape(B * blocks, 2 * W, H, D)

    q = in_blocks(jnp.pad(q, ((0, 0), (0, tail), (0, 0), (0, 0)))).reshape(B * blocks, W, H, D)
    reach = jnp.minimum(in_blocks(jnp.pad(place, ((0, 0), (0, tail)))), W - 1)  # how far back a query sees
    back = jnp.arange(W)[:, None] + W - jnp.arange(2 * W)  # how far back from query i key j lies
    mask = (back >= 0) & (back <= reach[..., None])
    o = jax.nn.dot_product_attention(q, two_blocks(k), two_blocks(v), mask=mask.reshape(-1, 1, W, 2 * W))
    return o.reshape(B, blocks * W, H, D)[:, :T]
