"""Rows times the matrix of their group, or times its transpose.

A tile's products go to the result by a copy of the kernel's own, of whole stripes: those that belong to one
group alone. The stripe at the border of two waits in fast memory until the next visit has its rows too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ...common.arguments import pad_to
from ...common.chips import LANES, VMEM_LIMIT
from ...common.tiling import round_up
from ...common.tpu import F32, Launch, dot, iota
from .packed import Packed
from .tiling import Tiling
from .visits import STRIPE, Visits, visits


def multiply(
    x: Array,
    w: Array | Packed,
    group_sizes: Array,
    t: Tiling,
    *,
    transposed: bool = False,
    interpret: bool,
) -> Array:
    """x [M, K] times w [E, K, N], or [E, N, K] if transposed: [M, N] in x's dtype; zeros past all groups."""
    M, (_, K, N) = x.shape[0], w.shape
    K, N = (N, K) if transposed else (K, N)
    x = pad_to(x, (round_up(M, STRIPE), K))
    steps = visits(group_sizes, x.shape[0], t.heights)
    y = visited(x, w, steps, t, transposed=transposed, interpret=interpret)
    return y if y.shape == (M, N) else y[:M, :N]


def visited(
    x: Array, w: Array | Packed, steps: Visits, t: Tiling, *, transposed: bool, interpret: bool
) -> Array:
    """The product for visits that are known; rows and columns are those of whole stripes and blocks."""
    M, K = x.shape
    across = pl.cdiv(w.shape[1 if transposed else 2], t.columns)
    name = "grouped_matmul" + "_transposed" * transposed
    grid, semantics = (across, steps.total[0]), ("parallel", "arbitrary")
    # Every visit lies within the arrays, whatever the group sizes: addresses need no tests.
    launch = Launch(name, grid, semantics, interpret=interpret, vmem_limit=VMEM_LIMIT, bounds_checks=False)
    usual = t.usual(M, w.shape[0])
    for field, scalars in _scalars(steps, t, usual).items():
        launch.prefetch(field, scalars)
    # The mask keeps every row: it tells the compiler that none is negative, and a division is one shift.
    rows = pl.BlockSpec(
        (pl.Element(t.rows), pl.Element(K)),
        lambda n, v, group, block, *_: ((block[v] & (2**27 - 1)) * STRIPE, 0),
    )
    launch.add("x", x, rows)
    decode = None
    if isinstance(w, Packed):
        decode = w.read(launch, t.columns, x.dtype, transposed, interpret)
    elif transposed:
        launch.add("w", w, pl.BlockSpec((None, t.columns, K), lambda n, v, group, *_: (group[v], n, 0)))
    else:
        launch.add("w", w, pl.BlockSpec((None, K, t.columns), lambda n, v, group, *_: (group[v], 0, n)))
    launch.write("y", (M, across * t.columns), x.dtype, pl.BlockSpec(memory_space=pl.ANY))
    launch.hold("tile", (2, t.rows, t.columns), x.dtype)
    launch.hold("border", (STRIPE, t.columns), x.dtype)
    launch.scratch["arrived"] = pltpu.SemaphoreType.DMA((2,))
    return launch.run(partial(_kernel, t, usual, transposed, decode, interpret))["y"]


def _scalars(steps: Visits, t: Tiling, usual: int) -> dict[str, Array]:
    """The visits for the kernel's scalar memory.

    A visit that shares no stripe, is not the last, and has the usual height gets a kind behind all others.
    `sent` counts the stripes that are copied, behind two visits that copy none; `offset` the rows of a block
    that are before the first one multiplied.
    """
    alone = (steps.low == steps.start) & (steps.high % STRIPE == 0) & (steps.kind == usual)
    alone &= np.arange(len(steps.low)) < steps.total[0] - 1
    kind = jnp.where(alone, len(t.heights) + 1, steps.kind)
    sent = jnp.pad((steps.high - steps.start) // STRIPE, (2, 0))
    offset = steps.base - steps.block
    steps = steps._replace(kind=kind, block=steps.block // STRIPE)
    return steps.scalars() | {"sent": sent, "offset": offset}


def _kernel(
    t: Tiling, usual: int, transposed: bool, decode: Callable[..., None] | None, interpret: bool, *,
    group_ref, block_ref, base_ref, start_ref, low_ref, high_ref, kind_ref, sent_ref, offset_ref, x_ref,
    w_ref, y_ref, tile_ref, border_ref, arrived_ref, **packed,
):  # fmt: skip
    """Grid (columns, visits)."""
    n, v, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    column = pl.multiple_of(n * t.columns, LANES)

    def copies(act: Callable[[Any], None], slot: Any, stripes: Any, first: Any = 0, start: Any = 0) -> None:
        """Start the copy of whole stripes from row `first` of a tile to `start`, or wait for one as long."""

        def copy(at: Any, rows: Any) -> None:
            tile = tile_ref.at[slot, pl.ds(pl.multiple_of(first + at, STRIPE), rows)]
            there = y_ref.at[pl.ds(pl.multiple_of(start + at, STRIPE), rows), pl.ds(column, t.columns)]
            act(pltpu.make_async_copy(tile, there, arrived_ref.at[slot]))

        if interpret:  # knows copies of a fixed size alone
            lax.fori_loop(0, stripes, lambda i, _: copy(i * STRIPE, STRIPE), None)
        else:
            copy(0, stripes * STRIPE)

    def arrived(before: int) -> None:
        """Wait for the copy of the visit that was so many before."""
        stripes = sent_ref[v + 2 - before]
        pl.when(stripes > 0)(lambda: copies(lambda copy: copy.wait(), (v - before) & 1, stripes))

    slot, kind = v & 1, kind_ref[v]
    arrived(2)

    if decode is not None:

        @pl.when((v == 0) | (group_ref[jnp.maximum(v - 1, 0)] != group_ref[v]))
        def _():
            decode(n=n, w_ref=w_ref, **packed)

    def multiply(height: int) -> None:
        x = x_ref[pl.ds(pl.multiple_of(offset_ref[v], STRIPE), height), :]
        y = dot(x, w_ref[...], "nt" if transposed else "nn")
        tile_ref[slot, pl.ds(0, height), :] = y.astype(tile_ref.dtype)

    for i, height in enumerate(t.heights):
        pl.when(kind == i)(partial(multiply, height))

    none, alone = len(t.heights), len(t.heights) + 1

    @pl.when(kind == alone)
    def _():
        multiply(t.heights[usual])
        # Here, not below: addresses are then computed while rows are multiplied.
        copies(lambda copy: copy.start(), slot, sent_ref[v + 2], start_ref[v] - base_ref[v], start_ref[v])

    @pl.when(kind != alone)
    def _():
        start, low, stripes = start_ref[v], low_ref[v], sent_ref[v + 2]
        first = pl.multiple_of(start - base_ref[v], STRIPE)  # row of the first stripe in the tile

        @pl.when(kind == none)
        def _():
            tile_ref[slot] = jnp.zeros(tile_ref.shape[1:], tile_ref.dtype)

        @pl.when(low > start)
        def _():
            stripe = tile_ref[slot, pl.ds(first, STRIPE)].astype(F32)
            earlier = iota(stripe.shape, 0) < low - start
            merged = jnp.where(earlier, border_ref[...].astype(F32), stripe)
            tile_ref[slot, pl.ds(first, STRIPE)] = merged.astype(tile_ref.dtype)

        @pl.when(high_ref[v] & (STRIPE - 1) != 0)
        def _():
            border_ref[...] = tile_ref[slot, pl.ds(pl.multiple_of(first + stripes * STRIPE, STRIPE), STRIPE)]

        pl.when(stripes > 0)(lambda: copies(lambda copy: copy.start(), slot, stripes, first, start))

        @pl.when(v == last)
        def _():
            arrived(1)
            arrived(0)
