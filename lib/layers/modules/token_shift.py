"""RWKV's token shift, and how the parameters around it start."""

import jax
import jax.numpy as jnp
from jax import Array

from ...kernels.common.documents import documents


def token_shift(x: Array, last: Array | None, segment_ids: Array | None) -> Array:
    """The token before each [B, T, D]: zeros before a document's first, `last` [B, D] before the call's."""
    # A pad, not a concatenation: where devices share the time axis, the compiler then sends one token.
    before = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (1, -1, 0), (0, 0, 0)))
    packed = documents(segment_ids, *x.shape[:2])
    if packed is not None:
        before = jnp.where(packed.starts[..., None], 0, before)
    if last is None:
        return before
    is_first = jnp.arange(x.shape[1])[None, :, None] == 0
    return jnp.where(is_first, last[:, None].astype(x.dtype), before)


def log_decay(w: Array) -> Array:
    """-exp(w), with w at most 5: the decay exp(-exp(5)) is 0 in float32, and its gradient stays finite."""
    return -jnp.exp(jnp.minimum(w, 5.0))


class Start:
    """Initial values that spread over channels (n in 0..1) and depend on the layer's place in depth."""

    def __init__(self, fraction):
        self.fraction = fraction

    def mix(self, key, shape, dtype):
        n = jnp.arange(shape[-1]) / shape[-1]
        return (1 - n ** (1 - self.fraction)).astype(dtype)

    def mixes(self, key, shape, dtype):  # r, k, v, g, w
        n, p = jnp.arange(shape[-1]) / shape[-1], 1 - self.fraction
        half, whole = 1 - n ** (0.5 * p), 1 - n**p
        return jnp.stack([half, whole, whole - 0.3 * self.fraction, half, whole]).astype(dtype)

    def four_mixes(self, key, shape, dtype):  # r, k, v, g
        return self.mixes(key, shape, dtype)[:4]

    def decay(self, key, shape, dtype):
        n = jnp.arange(shape[-1]) / max(shape[-1] - 1, 1)
        return (-6 + 5 * n ** (0.7 + 1.3 * self.fraction)).astype(dtype)

    def bonus(self, key, shape, dtype):
        channels = jnp.arange(shape[0] * shape[1])
        zigzag = 0.1 * ((channels + 1) % 3 - 1).astype(jnp.float32)
        falling = self.fraction * (1 - channels / max(channels.size - 1, 1))
        return (falling + zigzag).reshape(shape).astype(dtype)
