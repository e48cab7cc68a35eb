"""A few tokens on a CPU: packed W is read once, and nothing decoded is written to memory.

XLA makes a sum over rows one loop over columns only if it is written out, row by row. A part of the sum has
few rows: as many streams as a cache holds at once. The parts are added up at the end (split-K, as in arXiv
2601.16536 for K >> N), so that cores have parts to share.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...formats import Integer
from ...formats.packing import planes
from .activations import quantize_activations
from .decode import block_of, groups
from .inputs import Inputs, Spec

TOKENS = 4  # more are faster as a product of matrices
LEAST = 2**18  # elements of W: smaller ones are not worth a program of so many terms


def serves(call: Inputs, spec: Spec) -> bool:
    """Say whether the call has few tokens, and groups that no part of the sum straddles."""
    (M, K), N, g = call.x.shape, call.codes.shape[1], spec.group_size
    if not isinstance(M, int) or M > TOKENS or K * N < LEAST or call.choices is not None:
        return False
    if call.codes.shape[0] * 8 != K * spec.format.bits or spec.activations is not None:
        return False
    block, narrow, rows = _sizes(call, spec)
    whole_groups = g >= K or block % g == 0 or g % block == 0
    return narrow % rows == 0 and g % rows == 0 and whole_groups and (g % narrow == 0 or narrow % g == 0)


def _sizes(call: Inputs, spec: Spec) -> tuple[int, int, int]:
    """The codes that are packed together, the bytes of their narrowest plane, and those of it in a part."""
    if spec.format.bits == 8:
        block = math.gcd(spec.K, 256)
        return block, block, 32
    block, width = block_of(spec, call.codes.shape[0]), planes(spec.format.bits)[-1][0]
    return block, block * width // 8, max(4 * width, 8)


def product(call: Inputs, spec: Spec) -> Array:
    """x W [M, N] in the accumulator's dtype, as a sum over tokens' own parts."""
    x = quantize_activations(call.x, spec).values
    block, narrow, few = _sizes(call, spec)
    N, inner = call.codes.shape[1], min(spec.group_size, narrow)
    shape = spec.K // block, narrow // inner, inner // few  # blocks, groups in a plane, parts of a group
    stored = groups(call, spec)
    scales = _of_blocks(stored.scales, spec, block)
    zeros = None if stored.zeros is None else _of_blocks(stored.zeros, spec, block)
    views = _plane_views(call.codes, spec, block, (narrow // inner, inner // few, few))

    def of_token(x: Array) -> Array:
        x = x.reshape(shape[0], block // narrow, *shape[1:], few, 1)
        total = jnp.zeros((), x.dtype)
        for s in range(block // narrow):  # codes s * narrow + [0, narrow) of every block
            zero = None if zeros is None else _of_part(zeros, s * narrow, narrow, block)
            rows = jnp.zeros((), x.dtype)
            for r in range(few):
                value = _value(views, s, r, spec).astype(x.dtype)
                rows += x[:, s, :, :, r] * (value if zero is None else value - zero)
            total += rows * _of_part(scales, s * narrow, narrow, block)
        parts = lax.optimization_barrier(total.reshape(-1, N))
        return jnp.ones((1, parts.shape[0]), x.dtype) @ parts

    return jnp.concatenate([of_token(row) for row in x])


def _plane_views(codes: Array, spec: Spec, block: int, shape: tuple[int, int, int]) -> list[tuple]:
    """(bits, place of the lowest, [blocks, bytes / narrow, *shape, N]) of each plane of the packing."""
    bits, N = spec.format.bits, codes.shape[1]
    if bits == 8:
        return [(8, 0, codes.reshape(-1, 1, *shape, N))]
    packed, views, byte = codes.reshape(-1, block * bits // 8, N), [], 0
    for width, low in planes(bits):
        count = block * width // 8
        views.append((width, low, packed[:, byte : byte + count].reshape(packed.shape[0], -1, *shape, N)))
        byte += count
    return views


def _value(views: list[tuple], s: int, r: int, spec: Spec) -> Array:
    """The values of the codes in row r of the s-th run of codes, [blocks, groups, parts, N]."""
    element, bits = spec.format.element, spec.format.bits
    code = jnp.zeros((), jnp.int32)
    for width, low, view in views:
        byte = view[:, s % view.shape[1], :, :, r]
        shift = s // view.shape[1] * width
        if width == bits == 8:
            return element.decode(byte.astype(jnp.int32))
        if width == bits and isinstance(element, Integer) and element.signed:
            # Bits at the top of a byte, of which the first is then the sign: the value times 2^(8 - width).
            top = (byte << (8 - width - shift)) & np.uint8(256 - (1 << (8 - width)))
            high = lax.bitcast_convert_type(top, jnp.int8).astype(jnp.int32).astype(jnp.float32)
            return high * 2.0 ** (width - 8)
        code = code | (((byte >> shift) & np.uint8((1 << width) - 1)).astype(jnp.int32) << low)
    sign = 1 << (bits - 1)
    return element.decode((code ^ sign) - sign if element.lowest < 0 else code)


def _of_blocks(a: Array, spec: Spec, block: int) -> Array:
    """What is stored for groups [G, N], as [blocks, groups in a block, N]."""
    blocks, (G, N) = spec.K // block, a.shape
    if blocks <= G:
        return a.reshape(blocks, -1, N)
    return jnp.broadcast_to(a[:, None], (G, blocks // G, N)).reshape(blocks, 1, N)


def _of_part(a: Array, first: int, count: int, block: int) -> Array:
    """Of [blocks, groups, N] those of codes [first, first + count), as [blocks, groups, 1, N]."""
    size = block // a.shape[1]
    return a[:, first // size : -(-(first + count) // size), None]
