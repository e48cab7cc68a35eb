"""Dense packing of small codes into bytes: n codes of b bits take n * b / 8 bytes.

Codes are packed in blocks of at most 256. A block is split into planes of 4, 2 and 1 bits (3 = 2 + 1), which
follow each other. Byte j of a plane of w bits holds, lowest bits first, the codes j, j + m, j + 2m, ... of
the block, where m = w / 8 of the block is the number of the plane's bytes: bytes that are read together
become codes that stand together by a shift and a mask. A kernel that reads a block needs no shuffle (the idea
of MARLIN's offline packing, arXiv 2408.11743), and blocks are contiguous.
"""

import math

import jax.numpy as jnp
from jax import Array

BLOCK = 256  # codes: the plane of one bit then has 32 bytes, the rows of a TPU's tile of them


def codes_per_unit(bits: int) -> int:
    """The number of codes that fill whole bytes: an axis is packed in multiples of it."""
    return 8 // math.gcd(bits, 8)


def block_size(n: int, bits: int) -> int:
    """The number of codes in each block of n packed ones: the greatest divisor of n and 256."""
    return n if bits == 8 else math.gcd(n, BLOCK)


def planes(bits: int) -> list[tuple[int, int]]:
    """(bits, place of the lowest) of each plane, in the order in which they are packed."""
    found, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, low))
            low += width
    return found


def pack(codes: Array, bits: int) -> Array:
    """Pack codes along the last axis.

    Args:
      codes: integers [..., n], of which the low `bits` are kept; n is a multiple of `codes_per_unit(bits)`.
      bits: 1..8.

    Returns:
      uint8 [..., n * bits / 8].
    """
    n = codes.shape[-1]
    block = block_size(n, bits)
    codes = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, block)
    packed = []
    for width, low in planes(bits):
        part = (codes >> low) & ((1 << width) - 1)
        part = part.reshape(*codes.shape[:-1], 8 // width, -1)
        shifts = _shifts(width, part.ndim)
        packed.append(jnp.sum(part << shifts, axis=-2, dtype=jnp.uint8))
    return jnp.concatenate(packed, axis=-1).reshape(*codes.shape[:-2], n * bits // 8)


def unpack(packed: Array, bits: int, *, signed: bool) -> Array:
    """Unpack the bytes of `pack` to int32 codes [..., n]; two's complement if signed."""
    n = packed.shape[-1] * 8 // bits
    block = block_size(n, bits)
    packed = packed.reshape(*packed.shape[:-1], -1, block * bits // 8)
    codes, byte = jnp.zeros((*packed.shape[:-1], block), jnp.int32), 0
    for width, low in planes(bits):
        count = block * width // 8
        shifts = _shifts(width, packed.ndim + 1)
        part = (packed[..., None, byte : byte + count] >> shifts) & ((1 << width) - 1)
        codes = codes | (part.astype(jnp.int32).reshape(codes.shape) << low)
        byte += count
    codes = codes.reshape(*packed.shape[:-2], n)
    return jnp.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes) if signed else codes


def _shifts(width: int, ndim: int) -> Array:
    """The first bit of each of a byte's codes, along the last axis but one of `ndim`."""
    return jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(*(1,) * (ndim - 2), -1, 1)
