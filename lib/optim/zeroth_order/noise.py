"""Directions that are never stored: each number is computed from the key and its index where it is needed.

`normal_like(key, x)` is `jax.random.normal` bit for bit, written out as plain arithmetic on an index: XLA
fuses it into the sum it is part of, on every platform and for every sharding, where jax's own generator is a
loop over whole arrays on CPU.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def normal_like(key: Array, x: Array, start: Array | int = 0) -> Array:
    """float32 standard normal numbers of x's shape: `jax.random.normal(key, x.shape)`.

    With `start` they are those of a slice of a larger array, whose number `start` is the slice's first.
    """
    bits = random_bits(key, x.shape, start)
    unit = lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1  # [0, 1)
    low = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    return jnp.float32(math.sqrt(2)) * lax.erf_inv(jnp.maximum(low, unit * (1 - low) + low))


def random_bits(key: Array, shape: tuple[int, ...], start: Array | int = 0) -> Array:
    """uint32 random bits: Threefry-2x32 with 20 rounds, of the index in row-major order, from `start` on."""
    k0, k1 = _words(key)
    ks = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = (
        ks[0],
        _plus_index(ks[1] + jnp.asarray(start, jnp.uint32), shape),
    )  # the index's upper word is zero
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << r) | (x1 >> (32 - r))) ^ x0
        x0, x1 = x0 + ks[(i + 1) % 3], x1 + ks[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0 ^ x1


def _words(key: Array) -> tuple[Array, Array]:
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return data[0], data[1]


def _plus_index(word: Array, shape: tuple[int, ...]) -> Array:
    """word + the row-major index of each element.

    Summed axis by axis from the key on: an index by itself would be the same in every turn of a loop, and so
    be computed before it and kept.
    """
    if math.prod(shape) >= 2**32:
        raise ValueError(f"params: got a leaf {list(shape)}; expected fewer than 2^32 numbers")
    stride = 1
    for axis in range(len(shape) - 1, -1, -1):
        along = jnp.arange(shape[axis], dtype=jnp.uint32) * jnp.uint32(stride)
        word = word + along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        stride *= shape[axis]
    return word
