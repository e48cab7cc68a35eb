"""The gradient of experts on Hopper: of each group, the sum of x_i^T y_i over its rows.

Rows are summed by chunks of DEPTH, which begin where DEPTH divides. A chunk that has rows of others is read
from a copy without them: zeros stand in their place, in x and in y, so that what isn't finite stays out.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...common.arguments import pad_to
from ...common.hopper import Tiles, swizzled
from ...common.tiling import round_up
from . import persistent
from .persistent import Tile, banded
from .tiling import DEPTH, ROWS, STORED, Tiling, of_experts


def edges(x: Array, start: Array, end: Array) -> Array:
    """The first and the last chunk of each group, its own rows alone: [E * 2 * DEPTH, K]."""
    chunks = jnp.stack([lax.div(start, DEPTH), lax.div(jnp.maximum(end - 1, 0), DEPTH)], 1)
    row = chunks[:, :, None] * DEPTH + jnp.arange(DEPTH, dtype=jnp.int32)[None, None]
    mine = (row >= start[:, None, None]) & (row < end[:, None, None])
    row = jnp.where(mine, row, x.shape[0]).reshape(-1)
    return x.at[row].get(mode="fill", fill_value=0)


def gradient(x: Array, y: Array, group_sizes: Array, *, interpret: bool) -> Array:
    """x [M, K], y [M, N] -> [E, K, N] in x's dtype; zeros for a group without rows."""
    (M, K), N, E = x.shape, y.shape[1], group_sizes.shape[0]
    sizes = of_experts(E, K, N)
    end = jnp.cumsum(group_sizes, dtype=jnp.int32)
    start = end - group_sizes
    rows, columns = K // sizes.rows, N // sizes.columns
    scratch = {
        "x_tile": swizzled((sizes.stages, DEPTH, sizes.rows), x.dtype),
        "y_tile": swizzled((sizes.stages, DEPTH, sizes.columns), x.dtype),
        "staged": swizzled((sizes.warpgroups, 2, ROWS, STORED), x.dtype),
    }
    at_edges = [edges(a, start, end) for a in (x, y)]
    # Copies of tiles take rows by eight. Where no chunk is whole, none is read from `whole`.
    whole = [pad_to(a, (round_up(M, 8), a.shape[1])) for a in (x, y)] if M >= DEPTH else at_edges
    return persistent.run(
        "grouped_matmul_experts",
        [start, end, *whole, *at_edges],
        jax.ShapeDtypeStruct((E, K, N), x.dtype),
        sizes,
        lambda *refs: E * rows * columns,
        partial(_tile, sizes=sizes, rows=rows, columns=columns, tiles=Tiles(interpret)),
        scratch,
        most=E * rows * columns,
        interpret=interpret,
    )


def _tile(
    number: Any, refs: Any, scratch: dict, *, sizes: Tiling, rows: int, columns: int, tiles: Tiles
) -> Tile:
    start_ref, end_ref, x_ref, y_ref, x_edges, y_edges, out_ref = refs
    group = lax.div(number, rows * columns)
    i, j = banded(lax.rem(number, rows * columns), rows, columns)
    start, end = start_ref[group], end_ref[group]
    first = lax.div(start, DEPTH)
    chunks = jnp.where(end > start, lax.div(end + DEPTH - 1, DEPTH) - first, 0)
    mine, leaving = pl.ds(i * sizes.rows, sizes.rows), pl.ds(j * sizes.columns, sizes.columns)

    def fetch(k, slot) -> None:
        def copy(x, y, row) -> None:
            row = pl.ds(row, DEPTH)
            arrived = scratch["arrived"].at[slot]
            plgpu.copy_gmem_to_smem(x.at[row, mine], scratch["x_tile"].at[slot], arrived)
            plgpu.copy_gmem_to_smem(y.at[row, leaving], scratch["y_tile"].at[slot], arrived)

        row = (first + k) * DEPTH
        lax.cond(
            (row >= start) & (row + DEPTH <= end),
            lambda: copy(x_ref, y_ref, row),
            lambda: copy(x_edges, y_edges, (2 * group + jnp.where(k > 0, 1, 0)) * DEPTH),
        )

    def operands(slot, warpgroup) -> tuple[Any, Any]:
        x = scratch["x_tile"].at[slot, :, pl.ds(warpgroup * ROWS, ROWS)]
        return tiles.transposed(x), scratch["y_tile"].at[slot]

    def store(total, warpgroup) -> None:
        row = pl.ds(i * sizes.rows + warpgroup * ROWS, ROWS)
        for n in range(sizes.columns // STORED):
            slot = scratch["staged"].at[warpgroup, n % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of the columns before the last ones
            slot[...] = total[:, n * STORED : (n + 1) * STORED].astype(out_ref.dtype)
            plgpu.commit_smem()
            column = pl.ds(j * sizes.columns + n * STORED, STORED)
            plgpu.copy_smem_to_gmem(slot, out_ref.at[group, row, column])

    return Tile(chunks, fetch, operands, store)
