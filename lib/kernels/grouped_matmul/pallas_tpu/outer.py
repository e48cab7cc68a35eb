"""The sum of x_i dy_i^T over each group's rows: the gradient of the groups' matrices."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.arguments import pad_to
from ...common.chips import LANES, VMEM_LIMIT
from ...common.tiling import round_up
from ...common.tpu import F32, Launch, dot, iota
from .tiling import OuterTiling
from .visits import STRIPE, Visits, visits


def outer_sums(x: Array, dy: Array, group_sizes: Array, t: OuterTiling, *, interpret: bool) -> Array:
    """x [M, K], dy [M, N] -> [E, K, N] in x's dtype; zeros for groups without rows."""
    M = round_up(x.shape[0], STRIPE)
    steps = visits(group_sizes, M, t.heights, every_group=True)
    sizes = group_sizes.shape[0], x.shape[1], dy.shape[1]
    x, dy = pad_to(x, (M, round_up(sizes[1], t.depth))), pad_to(dy, (M, round_up(sizes[2], t.columns)))
    return visited(x, dy, steps, sizes, t, interpret=interpret)


def visited(
    x: Array, dy: Array, steps: Visits, sizes: tuple[int, int, int], t: OuterTiling, *, interpret: bool
) -> Array:
    """`outer_sums` for visits that are known, and x and dy in whole blocks; sizes: E, K, N."""
    grid = x.shape[1] // t.depth, dy.shape[1] // t.columns, steps.total[0]
    semantics = ("parallel", "parallel", "arbitrary")
    launch = Launch("grouped_matmul_outer", grid, semantics, interpret=interpret, vmem_limit=VMEM_LIMIT)
    for field, scalars in steps.scalars().items():
        launch.prefetch(field, scalars)

    def of_x(k, n, v, group, block, *_):
        return pl.multiple_of(block[v], STRIPE), pl.multiple_of(k * t.depth, LANES)

    def of_dy(k, n, v, group, block, *_):
        return pl.multiple_of(block[v], STRIPE), pl.multiple_of(n * t.columns, LANES)

    launch.add("x", x, pl.BlockSpec((pl.Element(t.rows), pl.Element(t.depth)), of_x))
    launch.add("dy", dy, pl.BlockSpec((pl.Element(t.rows), pl.Element(t.columns)), of_dy))
    block = pl.BlockSpec((None, t.depth, t.columns), lambda k, n, v, group, *_: (group[v], k, n))
    launch.write("dw", sizes, x.dtype, block)
    if x.dtype != F32:
        launch.hold("sum", (t.depth, t.columns))
    return launch.run(partial(_kernel, t))["dw"]


def _kernel(
    t: OuterTiling, *, group_ref, block_ref, base_ref, start_ref, low_ref, high_ref, kind_ref,
    x_ref, dy_ref, dw_ref, sum_ref=None,
):  # fmt: skip
    """Grid (depth, columns, visits)."""
    v, end = pl.program_id(2), pl.num_programs(2) - 1
    sum_ref = dw_ref if sum_ref is None else sum_ref
    group, base = group_ref[v], base_ref[v]
    first = (v == 0) | (group_ref[jnp.maximum(v - 1, 0)] != group)
    last = (v == end) | (group_ref[jnp.minimum(v + 1, end)] != group)

    def visit(height, write):
        here = pl.ds(pl.multiple_of(base - block_ref[v], STRIPE), height)
        mine = _rows(height, low_ref[v] - base, high_ref[v] - base, x_ref.dtype)

        product = dot(_only(x_ref[here, :], mine), _only(dy_ref[here, :], mine), "tn")
        write(product + jnp.where(first, 0.0, sum_ref[...]))

    def keep(total):
        sum_ref[...] = total

    def give(total):
        dw_ref[...] = total.astype(dw_ref.dtype)

    for kind, height in enumerate(t.heights):
        if sum_ref is dw_ref:
            pl.when(kind_ref[v] == kind)(partial(visit, height, keep))
        else:
            pl.when((kind_ref[v] == kind) & ~last)(partial(visit, height, keep))
            pl.when((kind_ref[v] == kind) & last)(partial(visit, height, give))

    @pl.when(kind_ref[v] == len(t.heights))
    def _():
        dw_ref[...] = jnp.zeros_like(dw_ref)


def _rows(height: int, low: Array, high: Array, dtype) -> Array:
    """The rows that count, for `_only`: low <= row < high. Two bfloat16 rows share a word of the mask."""
    if dtype == F32:
        row = iota((height, LANES), 0)
        return jnp.where((row >= low) & (row < high), np.int32(-1), np.int32(0))
    row = 2 * iota((height // 2, LANES), 0)
    even = jnp.where((row >= low) & (row < high), np.int32(0xFFFF), np.int32(0))
    return even | jnp.where((row + 1 >= low) & (row + 1 < high), np.int32(-65536), np.int32(0))


def _only(x: Array, mine: Array) -> Array:
    """Rows of x that count, zeros in place of others: whatever stands there, NaN too."""
    mask = jnp.concatenate([mine] * (x.shape[1] // LANES), 1)
    if x.dtype == F32:
        return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & mask, F32)
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & mask, x.dtype)
