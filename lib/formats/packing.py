"""Dense packing of small codes into bytes: n codes of b bits take n * b / 8 bytes."""

import math

import jax.numpy as jnp
from jax import Array


def codes_per_unit(bits: int) -> int:
    """The number of codes that fill whole bytes: an axis is packed in multiples of it."""
    return 8 // math.gcd(bits, 8)


def pack(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis.

    Args:
      codes: integers [..., n], of which the low `bits` are kept; n is a multiple of `codes_per_unit(bits)`.
      bits: 1..8.

    Returns:
      uint8 [..., n * bits / 8]. Codes are split into planes of 4, 2 and 1 bits (3 = 2 + 1). Each plane is
      packed by itself, the first code in the lowest bits, and planes follow each other.
    """
    codes = codes.astype(jnp.uint8)
    planes, low = [], 0
    for width in _planes(bits):
        part = (codes >> low) & ((1 << width) - 1)
        part = part.reshape(*codes.shape[:-1], -1, 8 // width)
        shifts = jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(*[1] * (part.ndim - 1), -1)
        planes.append(jnp.sum(part << shifts, axis=-1, dtype=jnp.uint8))
        low += width
    return planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis=-1)


def unpack(packed: Array, bits: int, *, signed: bool) -> Array:
    """Unpack the bytes of `pack` to int32 codes [..., n]; two's complement if signed."""
    n = packed.shape[-1] * 8 // bits
    codes, low, byte = jnp.zeros((*packed.shape[:-1], n), jnp.int32), 0, 0
    for width in _planes(bits):
        count = n * width // 8
        shifts = jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(*[1] * packed.ndim, -1)
        part = (packed[..., byte : byte + count, None] >> shifts) & ((1 << width) - 1)
        codes = codes | (part.astype(jnp.int32).reshape(codes.shape) << low)
        low, byte = low + width, byte + count
    return jnp.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes) if signed else codes


def _planes(bits: int) -> list[int]:
    return [width for width in (8, 4, 2, 1) if bits & width]
