"""Products by looking sums up: four activations have 16 signed sums, and four bits of W say which one.

W's codes are split in bit planes. With bits b = (s + 1) / 2 a value is a constant and a sum of signs s times
powers of two. So x W is a sum over planes of sums looked up; only scales multiply. The sums of bits i and of
15 - i are the negative of each other: half of a table is enough.

Source: Wei et al. 2024, T-MAC (arXiv 2407.00088); Mo et al. 2024, LUT Tensor Core (2408.06003), for the half.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...formats import Bipolar, Format
from .activations import each_segment, quantize_activations
from .decode import groups
from .inputs import Inputs, Spec, weights

SUMMED = 4  # activations under one look-up
HALF = 2 ** (SUMMED - 1)  # entries of a table


def product(call: Inputs, spec: Spec) -> Array:
    """x W [M, N] in the accumulator's dtype."""
    x, stored = quantize_activations(call.x, spec), groups(call, spec)
    dtype = x.values.dtype
    segment = min(spec.group_size, x.block)
    tokens = _fours(x.values, segment)
    index = plane_index(_fours(weights(call, spec).unpacked(), segment), spec.format.bits)
    signs, constant = as_signs(spec.format)
    sums = look_up(signed_sums(tokens), index, signs, rounded=spec.method == "lut_int8")
    n, totals = tokens.shape[0], tokens.sum((2, 3))[:, :, None]  # of each segment's activations
    shift = (
        constant
        if stored.zeros is None
        else constant - each_segment(stored.zeros, spec.group_size, segment, n)[:, None]
    )
    sums += totals * jnp.asarray(shift, dtype)
    scales = each_segment(stored.scales, spec.group_size, segment, n)[:, None].astype(dtype)
    if x.scales is not None:
        scales = scales * each_segment(x.scales.T, x.block, segment, n)[:, :, None]
    return jnp.sum(sums * scales, 0)


def as_signs(format: Format) -> tuple[np.ndarray, float]:
    """Factors of the signs of a code's bits, the lowest first, and the constant that makes them its value."""
    powers = 2.0 ** np.arange(format.bits)
    if isinstance(format.element, Bipolar):
        return powers, 0.0
    if format.element.lowest < 0:  # two's complement
        powers[-1] *= -1
    return powers / 2, float(powers.sum() / 2)


def signed_sums(x: Array) -> Array:
    """Half of the 16 signed sums of every four activations: [..., 4] -> [..., 8].

    Entry i is the sum of x_r where bit r of i is set, and of -x_r elsewhere. That of 15 - i is its negative.
    """
    bits = (np.arange(HALF)[:, None] >> np.arange(SUMMED)) & 1
    signs = jnp.asarray(2 * bits - 1, x.dtype).reshape(*[1] * (x.ndim - 1), HALF, SUMMED)
    terms = [x[..., r, None] * signs[..., r] for r in range(SUMMED)]
    return (terms[0] + terms[1]) + (terms[2] + terms[3])


def plane_index(codes: Array, bits: int) -> Array:
    """The sum that each four bits pick: [segments, N, fours, 4] -> uint8 [segments, bits, fours, N]."""
    planes = (codes[:, None] >> np.arange(bits, dtype=np.int32)[:, None, None, None]) & 1
    index = jnp.sum(planes << np.arange(SUMMED, dtype=np.int32)[None, None, None, None], -1)
    return jnp.swapaxes(index, 2, 3).astype(jnp.uint8)


def look_up(tables: Array, index: Array, signs: np.ndarray, *, rounded: bool) -> Array:
    """Sums over planes and fours of what the index picks, times the planes' factors.

    Args:
      tables: [segments, M, fours, 8], as `signed_sums` gives them.
      index: [segments, bits, fours, N], as `plane_index` gives it.
      signs: a factor for each plane [bits].
      rounded: store tables in 8 bits, with one scale for each token and segment.

    Returns:
      [segments, M, N].
    """
    dtype = tables.dtype

    def of_segment(given: tuple[Array, Array]) -> Array:
        table, picks = given
        scale = jnp.ones((), dtype)
        if rounded:
            scale = jnp.max(jnp.abs(table), (1, 2), keepdims=True) / 127
            table = jnp.round(table / jnp.where(scale == 0, 1, scale)).astype(jnp.int8).astype(jnp.int32)
        mirrored = picks >= HALF
        entry = jnp.where(mirrored, 2 * HALF - 1 - picks, picks).astype(jnp.int32)
        # [M, bits, fours, N], of which only the sum over fours is written
        found = jnp.take_along_axis(table[:, None], entry[None], -1, mode="promise_in_bounds")
        sums = jnp.sum(jnp.where(mirrored, -found, found), 2).astype(dtype)
        sums = jnp.sum(sums * jnp.asarray(signs, dtype)[None, :, None], 1)
        return sums * (scale[:, 0] if rounded else scale)

    return lax.map(of_segment, (tables, index))


def _fours(a: Array, segment: int) -> Array:
    """[rows, K] as [segments, rows, fours, 4]; zeros fill the last segment, and its last four."""
    rows, K = a.shape
    n = -(-K // segment)
    a = jnp.pad(a, ((0, 0), (0, n * segment - K))).reshape(rows, n, segment)
    a = jnp.pad(a, ((0, 0), (0, 0), (0, -segment % SUMMED))).reshape(rows, n, -1, SUMMED)
    return jnp.swapaxes(a, 0, 1)
