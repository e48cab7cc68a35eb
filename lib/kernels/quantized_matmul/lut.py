"""Products by looking sums up: four activations have 16 signed sums, and four bits of W say which one.

W's codes are split in bit planes. With bits b = (s + 1) / 2 a value is a constant and a sum of signs s times
powers of two. So x W is a sum over planes of sums looked up; only scales multiply. The sum of opposite signs
is the negative: half of a table is enough, and the fourth bit is a sign.

Bits are read where they are packed. A look-up in half a table is a tree of seven choices, one bit at a time:
XLA makes it vector instructions for many columns at once, as it does of no gather.

Source: Wei et al. 2024, T-MAC (arXiv 2407.00088); Mo et al. 2024, LUT Tensor Core (2408.06003), for the half.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ...formats import Bipolar, Format
from ..common.arguments import pad_to
from .activations import quantize_activations
from .decode import block_of, groups, unpack_rows
from .inputs import Inputs, Spec
from .streamed import Plane, aligned, of_run, planes_of, summed

SUMMED = 4  # activations under one look-up
FEW = 2  # tokens; of more, one program does one after another


def product(call: Inputs, spec: Spec) -> Array:
    """x W [M, N] in the accumulator's dtype."""
    rounded, stored = quantize_activations(call.x, spec), groups(call, spec)
    x = rounded.values
    if rounded.scales is not None:
        x = x * jnp.repeat(rounded.scales, rounded.block, 1)[:, : spec.K]
    codes, size = call.codes.astype(jnp.uint8), spec.group_size
    every = planes_of(call, spec, _rows)
    if not aligned(call, spec, every):
        x, codes, plane = _bytes(x, call, spec)
        every, size = [plane], min(plane.block, -(-size // plane.rows) * plane.rows)
    signs, constant = as_signs(spec.format)
    shift = constant * jnp.ones((1, 1)) if stored.zeros is None else constant - stored.zeros
    scales = stored.scales.astype(x.dtype)
    shift = jnp.broadcast_to(shift, scales.shape).astype(x.dtype)

    def of_token(token: Array) -> Any:
        token, own = lax.optimization_barrier((token, codes))  # no bits are taken apart before the loop
        # The constant is added with the top plane.
        shifts = (shift if p is every[-1] else None for p in every)
        return sum(
            _plane_product(token, own, p, size, signs, scales, shift, spec.method == "lut_int8")
            for p, shift in zip(every, shifts, strict=True)
        )

    if isinstance(x.shape[0], int) and x.shape[0] <= FEW:
        return jnp.concatenate([of_token(token) for token in x])
    return lax.map(of_token, x)[:, 0]


def as_signs(format: Format) -> tuple[np.ndarray, float]:
    """Factors of the signs of a code's bits, the lowest first, and the constant that makes them its value."""
    powers = 2.0 ** np.arange(format.bits)
    if isinstance(format.element, Bipolar):
        return powers, 0.0
    if format.element.lowest < 0:  # two's complement
        powers[-1] *= -1
    return powers / 2, float(powers.sum() / 2)


def signed_sums(x: Array) -> list[Array]:
    """Eight of the signed sums of four activations [..., 4]: entry i adds x_r where bit r of i is set.

    It subtracts x_r elsewhere, and always adds x_3. The other eight are the negatives.
    """
    sums = [x[..., SUMMED - 1]]
    for r in range(SUMMED - 1):
        sums = [s - x[..., r] for s in sums] + [s + x[..., r] for s in sums]
    return sums


def look_up(table: list[Array], bits: list[Array], negative: Array) -> Array:
    """The entry whose number has the given bits, lowest first; its negative where `negative`."""
    for bit in bits:
        table = [jnp.where(bit, odd, even) for even, odd in zip(table[::2], table[1::2], strict=True)]
    return jnp.where(negative, -table[0], table[0])


def _plane_product(
    x: Array,
    codes: Array,
    p: Plane,
    group_size: int,
    signs: np.ndarray,
    scales: Array,
    shift: Array | None,
    rounded: bool,
) -> Array:
    """The share of a plane of W in the product with one token x [K]: [1, N]."""
    K, N, fours = x.shape[0], codes.shape[1], p.rows // SUMMED
    shape = p.shape(K, group_size)
    packed = codes.reshape(shape[0], -1, N)
    x = x.reshape(shape[0], 8 // p.width, *shape[1:], fours, SUMMED)
    table, step = signed_sums(x), None
    if rounded:  # to 8 bits, with one scale for each group of a run
        largest = jnp.max(jnp.stack([jnp.abs(s) for s in table]), (0, 4, 5))
        step = largest[..., None] / 127
        table = [jnp.round(s / jnp.where(step == 0, 1, step)[..., None]) for s in table]
    total = jnp.zeros((), x.dtype)
    for run in range(8 // p.width):  # of codes, run * p.bytes + [0, p.bytes) of every block
        of_bits = [jnp.zeros((), x.dtype)] * min(p.width, len(signs))
        for four in range(fours):
            first = p.first + SUMMED * four
            rows = [
                packed[:, first + r : p.first + p.bytes : p.rows].reshape(*shape, N) for r in range(SUMMED)
            ]
            same = [~(row ^ rows[-1]) for row in rows[:-1]]  # as the fourth, the sign of which is taken out
            entries = [s[:, run, ..., four, None] for s in table]
            for i, found in enumerate(of_bits):
                bit = np.uint8(1 << (run * p.width + i))
                picks = [(row & bit) != 0 for row in same]
                of_bits[i] = found + look_up(entries, picks, (rows[-1] & bit) == 0)
        part = sum(found * float(signs[p.low + i]) for i, found in enumerate(of_bits))
        if step is not None:
            part *= step[:, run, ..., None]
        if shift is not None:
            part += jnp.sum(x[:, run], (-2, -1))[..., None] * of_run(shift, p, K, run)
        total += part * of_run(scales, p, K, run)
    return summed(total.reshape(-1, N))


def _rows(width: int) -> int:
    """The rows of bytes of a plane of so many bits that a part of the sum has."""
    return 2 * SUMMED if width > 2 else SUMMED


def _bytes(x: Array, call: Inputs, spec: Spec) -> tuple[Array, Array, Plane]:
    """x [M, K'] and codes [K', N], one in each byte: groups are padded to parts of a sum."""
    K, rows = spec.K, _rows(8)
    n = -(-K // spec.group_size)
    size = -(-spec.group_size // rows) * rows

    def padded(a: Array, axis: int) -> Array:
        """Fill up each group along an axis with zeros."""
        before, after = a.shape[:axis], a.shape[axis + 1 :]
        a = pad_to(a, (*before, n * spec.group_size, *after)).reshape(*before, n, spec.group_size, *after)
        return pad_to(a, (*before, n, size, *after)).reshape(*before, n * size, *after)

    codes = unpack_rows(call.codes, spec.format, block_of(spec, call.codes.shape[0]))[:K]
    return padded(x, 1), padded(codes.astype(jnp.uint8), 0), Plane(n * size, 0, 8, 0, rows)
