"""Rows times the matrix of their group on Hopper: y_i = x_i W_e(i), or x_i W_e(i)^T.

A tile of rows begins where its group does, at any row. The last tile of a group ends with it: it has some
rows of the one before again. So whole tiles are stored, but for groups shorter than one.
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
from . import persistent
from .persistent import Tile, banded
from .tiling import DEPTH, ROWS, STORED, Tiling, of_rows


def visits(group_sizes: Array, M: int, rows: int) -> tuple[Array, Array]:
    """The tiles of rows: int32 [3, at most M // rows + E + 1] and how many there are, [1].

    Of each: its group, its first row, its rows. Rows past all groups are group E, of zeros.
    """
    E = group_sizes.shape[0]
    sizes = jnp.append(group_sizes, M - jnp.sum(group_sizes, dtype=jnp.int32))
    tiles = -(-sizes // rows)
    # Sums over the groups before, of all at once: one small kernel where a cumulative sum is several.
    before = jnp.tri(E + 1, k=-1, dtype=bool)
    start, first = (jnp.sum(jnp.where(before, x, 0), 1, dtype=jnp.int32) for x in (sizes, tiles))
    visit = jnp.arange(M // rows + E + 1, dtype=jnp.int32)
    group = jnp.sum(visit[:, None] >= (first + tiles)[None, :-1], 1, dtype=jnp.int32)
    size, start = sizes[group], start[group]
    row = jnp.minimum((visit - first[group]) * rows, jnp.maximum(size - rows, 0))
    found = jnp.stack([group, start + row, jnp.clip(size, 0, rows)])
    return found, jnp.sum(tiles, dtype=jnp.int32)[None]


def product(x: Array, w: Array, group_sizes: Array, *, transposed: bool, interpret: bool) -> Array:
    """x [M, K] times w [E, K, N], or w [E, N, K] transposed: [M, N] in x's dtype."""
    (M, K), E, N = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    sizes = of_rows(M, E, N)
    found, count = visits(group_sizes, M, sizes.rows)
    # The copy engine fills up what lies past the last row; the interpreter refuses it.
    x = pad_to(x, (M + sizes.rows if interpret else max(M, sizes.rows), K))
    columns, steps = N // sizes.columns, K // DEPTH
    shape = (sizes.columns, DEPTH) if transposed else (DEPTH, sizes.columns)
    two_views = partial(persistent.two_views, dtype=x.dtype, interpret=interpret)
    scratch = {
        "x_tile": two_views((sizes.stages, sizes.rows, DEPTH)),
        "w_tile": swizzled((sizes.stages, *shape), x.dtype),
        "staged": two_views((sizes.warpgroups, 2, ROWS, STORED)),
    }
    tile = partial(
        _tile, sizes=sizes, columns=columns, steps=steps, transposed=transposed, interpret=interpret
    )
    return persistent.run(
        "grouped_matmul_backward" if transposed else "grouped_matmul",
        [found[0], found[1], found[2], count, x, w],
        jax.ShapeDtypeStruct((M, N), x.dtype),
        sizes,
        lambda *refs: refs[3][0] * columns,
        tile,
        scratch,
        most=found.shape[1] * columns,
        interpret=interpret,
    )


def _tile(
    number: Any,
    refs: Any,
    scratch: dict,
    *,
    sizes: Tiling,
    columns: int,
    steps: int,
    transposed: bool,
    interpret: bool,
) -> Tile:
    group_ref, first_ref, rows_ref, count_ref, x_ref, w_ref, out_ref = refs
    (x_rows, x_tile), w_tile = (
        persistent.views(scratch["x_tile"], interpret=interpret),
        scratch["w_tile"],
    )
    staged_rows, staged = persistent.views(scratch["staged"], interpret=interpret)
    visit, j = banded(number, count_ref[0], columns)
    group, first, rows = group_ref[visit], first_ref[visit], rows_ref[visit]
    mine = pl.ds(j * sizes.columns, sizes.columns)

    def fetch(k, slot) -> None:
        arrived = scratch["arrived"].at[slot]
        depth = pl.ds(k * DEPTH, DEPTH)
        plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(first, sizes.rows), depth], x_rows.at[slot], arrived)
        part = (mine, depth) if transposed else (depth, mine)
        plgpu.copy_gmem_to_smem(w_ref.at[group, *part], w_tile.at[slot], arrived)

    def operands(slot, warpgroup) -> tuple[Any, Any]:
        x, w = x_tile.at[slot, pl.ds(warpgroup * ROWS, ROWS)], w_tile.at[slot]
        return x, Tiles(interpret).transposed(w) if transposed else w

    def leave(valid, staged, row, column) -> None:
        """Copy the first `valid` of ROWS rows, by powers of two, since copies have fixed sizes."""
        for power in (1 << bit for bit in reversed(range(ROWS.bit_length()))):
            above = lax.div(valid, 2 * power) * (2 * power)  # rows in larger powers

            @pl.when(lax.rem(lax.div(valid, power), 2) == 1)
            def _(power=power, above=above):
                plgpu.copy_smem_to_gmem(
                    staged.at[pl.ds(above, power)],
                    out_ref.at[pl.ds(row + above, power), pl.ds(column, STORED)],
                    commit_group=False,
                )

        plgpu.commit_smem_to_gmem_group()

    def store(y, warpgroup) -> None:
        valid = jnp.clip(rows - warpgroup * ROWS, 0, ROWS)
        for n in range(0, sizes.columns, STORED):
            slot = n // STORED % 2
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of the columns before the last ones
            staged[warpgroup, slot] = y[:, n : n + STORED].astype(out_ref.dtype)
            plgpu.commit_smem()
            place = first + warpgroup * ROWS, j * sizes.columns + n
            leave(valid, staged_rows.at[warpgroup, slot], *place)

    return Tile(jnp.where(group < w_ref.shape[0], steps, 0), fetch, operands, store)
