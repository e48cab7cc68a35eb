"""A few tokens on a CPU: packed W is read once, and nothing decoded is written to memory.

XLA makes a sum over rows one loop over columns only if it is written out, row by row. A part of the sum has
few rows: as many streams as a cache holds at once. The parts are added up at the end (split-K, as in arXiv
2601.16536 for K >> N), so that cores have parts to share.

Integers of several bit planes are a sum of their planes, each of which is a stream of its own.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...formats import Bipolar, Element, Integer
from ...formats.packing import planes
from .activations import quantize_activations
from .decode import Groups, block_of, groups
from .inputs import Inputs, MixedActivations, Spec

TOKENS = 2  # more are faster as a product of matrices
LEAST = 2**18  # elements of W: smaller ones are not worth a program of so many terms
# Rows of 4096 bytes, or of a multiple, fall into one set of a first-level cache, which holds 8 to 12 of them.
STREAMS = 8


class Plane(NamedTuple):
    """A plane of the packing: byte j of a block holds codes j, j + bytes, j + 2 bytes, ..."""

    block: int  # codes that are packed together
    first: int  # byte of a packed block
    width: int  # bits
    low: int  # place of the lowest bit in a code
    rows: int  # bytes in a part of the sum

    @property
    def bytes(self) -> int:
        return self.block * self.width // 8

    def shape(self, K: int, group_size: int) -> tuple[int, int, int]:
        """Blocks of K rows of W, groups of one block's bytes, and parts of a group."""
        inner = min(group_size, self.bytes)  # bytes that share a scale
        return K // self.block, self.bytes // inner, inner // self.rows


def serves(call: Inputs, spec: Spec) -> bool:
    """Say whether the call has few tokens, and groups that no part of the sum straddles."""
    (M, K), N = call.x.shape, call.codes.shape[1]
    if not isinstance(M, int) or M > TOKENS or K * N < LEAST or not spec.format.elementwise:
        return False
    rounded = spec.activations
    if isinstance(rounded, MixedActivations) or (rounded is not None and (rounded.group_size or K) < K):
        return False
    every = _planes(call, spec)
    return aligned(call, spec, every) and (len(every) == 1 or _is_sum(spec))


def aligned(call: Inputs, spec: Spec, every: list[Plane]) -> bool:
    """Say whether W fills whole blocks of packed codes, and no part of a sum has rows of two groups."""
    K, g, block = spec.K, spec.group_size, every[0].block
    if call.codes.shape[0] * 8 != K * spec.format.bits or not (g >= K or block % g == 0 or g % block == 0):
        return False
    return all(
        p.bytes % p.rows == 0 and g % p.rows == 0 and (g % p.bytes == 0 or p.bytes % g == 0) for p in every
    )


def product(call: Inputs, spec: Spec) -> Array:
    """x W [M, N] in the accumulator's dtype."""
    x, stored = quantize_activations(call.x, spec), groups(call, spec)
    every = _planes(call, spec)
    tokens = []
    for token in x.values:
        of_planes = [_plane_product(token, call.codes, spec, p, stored) for p in every]
        tokens.append(jnp.sum(jnp.concatenate(of_planes), 0, keepdims=True) if every[1:] else of_planes[0])
    y = jnp.concatenate(tokens)
    return y if x.scales is None else y * x.scales


def _plane_product(x: Array, codes: Array, spec: Spec, p: Plane, stored: Groups) -> Array:
    """The share of a plane of W in the product with one token x [K]: [1, N]."""
    N, dtype, top = codes.shape[1], x.dtype, p.low + p.width == spec.format.bits
    shape = p.shape(spec.K, spec.group_size)
    packed = codes.reshape(shape[0], -1, N)
    x = x.reshape(shape[0], -1, *shape[1:], p.rows, 1)
    factor, constant = _affine(spec.format.element, p, top)
    if stored.zeros is None and constant == 0:  # a product less for each weight
        x, factor = x * factor, 1.0
    total = jnp.zeros((), dtype)
    for run in range(8 // p.width):  # of codes, run * p.bytes + [0, p.bytes) of every block
        # A zero is taken off one plane of several.
        zero = None if stored.zeros is None or not top else of_run(stored.zeros, p, spec.K, run)
        part = jnp.zeros((), dtype)
        for row in range(p.rows):
            byte = packed[:, p.first + row : p.first + p.bytes : p.rows].reshape(*shape, N)
            value = _value(byte, run, spec.format.element, p, top).astype(dtype)
            value = value if factor == 1 else value * factor
            value = value if constant == 0 else value - constant
            part += x[:, run, :, :, row] * (value if zero is None else value - zero)
        total += part * of_run(stored.scales, p, spec.K, run)
    return summed(total.reshape(-1, N))


def summed(parts: Array) -> Array:
    """The sum [1, N] of parts [n, N], as a product that waits for all of them."""
    parts = lax.optimization_barrier(parts)
    return jnp.ones((1, parts.shape[0]), parts.dtype) @ parts


def _planes(call: Inputs, spec: Spec) -> list[Plane]:
    return planes_of(call, spec, lambda width: STREAMS)


def planes_of(call: Inputs, spec: Spec, rows: Callable[[int], int]) -> list[Plane]:
    """List the planes of W's packing; `rows` says how many bytes of a plane of so many bits a part sums."""
    bits, found = spec.format.bits, []
    block, first = math.gcd(spec.K, 256) if bits == 8 else block_of(spec, call.codes.shape[0]), 0
    for width, low in planes(bits):
        found.append(Plane(block, first, width, low, rows(width)))
        first += found[-1].bytes
    return found


def _is_sum(spec: Spec) -> bool:
    """Say whether a value is a sum over the planes of its code."""
    return isinstance(spec.format.element, Integer | Bipolar)


def _affine(element: Element, p: Plane, top: bool) -> tuple[float, float]:
    """The factor of a plane's `_value`, and what is taken off then."""
    if isinstance(element, Bipolar):
        return 2.0 * 2**p.low, element.largest if top else 0.0
    if not isinstance(element, Integer):
        return 1.0, 0.0
    return 2.0 ** (p.low + p.width - 8 if top and element.signed else p.low), 0.0


def _value(byte: Array, run: int, element: Element, p: Plane, top: bool) -> Array:
    """The number that the bits of a run of codes are in their bytes; of the element, if it is no integer."""
    shift = run * p.width
    if top and isinstance(element, Integer) and element.signed:
        # At the top of a byte their first bit is the sign.
        if p.width < 8:
            byte = (byte << (8 - p.width - shift)) & np.uint8(256 - (1 << (8 - p.width)))
            byte = lax.bitcast_convert_type(byte, jnp.int8)
        return byte.astype(jnp.int32).astype(jnp.float32)
    bits = ((byte >> shift) & np.uint8((1 << p.width) - 1) if p.width < 8 else byte).astype(jnp.int32)
    return bits.astype(jnp.float32) if isinstance(element, Integer | Bipolar) else element.decode(bits)


def of_run(a: Array, p: Plane, K: int, run: int) -> Array:
    """Cut a run's share from what is stored for groups [G, N] of K rows, as [blocks, groups, 1, N]."""
    blocks, (G, N) = K // p.block, a.shape
    if blocks > G:
        return jnp.broadcast_to(a[:, None], (G, blocks // G, N)).reshape(blocks, 1, 1, N)
    size = p.block * blocks // G
    first, end = run * p.bytes // size, -(-(run + 1) * p.bytes // size)
    return a.reshape(blocks, -1, N)[:, first:end, None]
