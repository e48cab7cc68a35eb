"""The recurrence on TPU: channels on lanes, token after token, the state in scratch between blocks of time.

The grid walks time in order (backwards if the recurrence does), so each of a, b and h crosses HBM once. The
gradient is the same walk from the other end, g_t = dh_t + a_{t+1} g_{t+1}, with da_t = g_t h_{t-1} beside it:
h's row before a block comes from a second, short view of h.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..common.chips import SUBLANES
from ..common.tpu import F32, Launch, TimeGrid, iota
from .inputs import Inputs
from .tiling import ROWS, TPUTiling, for_tpu


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    for x in (call.a, call.b):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"the TPU kernel reads float32 and bfloat16, not {x.dtype}"
    return None


def forward(call: Inputs, reverse: bool, *, interpret: bool) -> tuple[Array, Array]:
    """h [B, T, D] in b's dtype and the last state [B, D] in float32."""
    B, T, D = call.b.shape
    blocks = _Blocks(call, for_tpu(T, D, time=512), backwards=reverse)
    launch = blocks.grid.launch("linear_recurrence", interpret=interpret)
    launch.add("a", call.a, blocks.block)
    launch.add("b", call.b, blocks.block)
    launch.add("s", call.initial_state[:, None], blocks.row)
    launch.write("h", call.b.shape, call.b.dtype, blocks.block)
    launch.write("last", (B, 1, D), F32, blocks.row)
    blocks.hold(launch, "state", "a_tile", "b_tile")
    got = launch.run(partial(_forward_kernel, blocks))
    return got["h"], got["last"][:, 0]


def backward(
    call: Inputs, h: Array, cotangents: tuple[Array, Array], reverse: bool, *, interpret: bool
) -> Inputs:
    """The gradients, as `Inputs`."""
    B, T, D = h.shape
    dh, dlast = cotangents
    blocks = _Blocks(call, for_tpu(T, D, time=256), backwards=not reverse)
    launch = blocks.grid.launch("linear_recurrence_backward", interpret=interpret)
    launch.add("a", call.a, blocks.block)
    launch.add("h", h, blocks.block)
    launch.add("outside", h, blocks.rows_outside)
    launch.add("dh", dh, blocks.block)
    launch.add("s", call.initial_state[:, None], blocks.row)
    launch.add("dlast", dlast[:, None], blocks.row)
    launch.write("da", call.a.shape, call.a.dtype, blocks.block)
    launch.write("db", call.b.shape, call.b.dtype, blocks.block)
    launch.write("ds", (B, 1, D), F32, blocks.row)
    blocks.hold(launch, "carry", "a_tile", "dh_tile")
    got = launch.run(partial(_backward_kernel, blocks))
    return Inputs(got["da"], got["db"], got["ds"][:, 0], None)


class _Blocks:
    """The order in which blocks of time are visited, and the views of arrays that go with it."""

    def __init__(self, call: Inputs, tiling: TPUTiling, backwards: bool):
        B, T, D = call.b.shape
        self.T, self.tiling, self.packed = T, tiling, call.starts is not None
        self.grid = TimeGrid((B, pl.cdiv(D, tiling.channels)), T, tiling.time, backwards)
        at = self.grid.at
        self.block = pl.BlockSpec((None, tiling.time, tiling.channels), lambda b, d, i: (b, at(i), d))
        self.row = pl.BlockSpec((None, 1, tiling.channels), lambda b, d, i: (b, 0, d))
        per_block = tiling.time // ROWS

        def outside(b, d, i):  # the ROWS tokens that the walk meets next; any, at its end
            if backwards:
                return b, jnp.maximum(at(i) * per_block - 1, 0), d
            return b, jnp.minimum((at(i) + 1) * per_block, pl.cdiv(T, ROWS) - 1), d

        self.rows_outside = pl.BlockSpec((None, ROWS, tiling.channels), outside)

    def hold(self, launch: Launch, state: str, *tiles: str) -> None:
        """Name the scratch: the state on every sublane, so that any row of a tile meets it; and tiles."""
        launch.hold(state, (SUBLANES, self.tiling.channels))
        for name in tiles:
            launch.hold(name, (ROWS, self.tiling.channels))

    def spread(self, tile_ref, row: int) -> Array:
        """A row of a tile on every sublane."""
        return jnp.broadcast_to(tile_ref[row : row + 1, :], (SUBLANES, self.tiling.channels))

    def kept(self, a: Array, h: Array) -> Array:
        """a h; between documents a zero forgets NaN and infinity too."""
        return jnp.where(a == 0, 0.0, a * h) if self.packed else a * h

    def column(self) -> "_Column":
        return _Column(self.tiling.channels)

    def each_tile(self, visit) -> None:
        """Call `visit(rows, first row, token numbers)` for the tiles of a block, in order."""
        first = self.grid.first_token()

        def step(row, _):
            visit(pl.ds(row, ROWS), row, first + row + iota((ROWS, self.tiling.channels), 0))
            return 0

        self.grid.each_tile(ROWS, step)

    def rows(self) -> range:
        return range(ROWS - 1, -1, -1) if self.grid.backwards else range(ROWS)


class _Column:
    """A tile put together from rows that lie on every sublane."""

    def __init__(self, channels: int):
        self.sublane = iota((SUBLANES, channels), 0)
        self.parts: list = [None] * (ROWS // SUBLANES)

    def put(self, row: int, value: Array) -> None:
        part, at = divmod(row, SUBLANES)
        before = self.parts[part]
        self.parts[part] = value if before is None else jnp.where(self.sublane == at, value, before)

    def tile(self) -> Array:
        return jnp.concatenate(self.parts, axis=0)


def _forward_kernel(
    blocks: _Blocks, *, a_ref, b_ref, s_ref, h_ref, last_ref, state_ref, a_tile_ref, b_tile_ref
):
    @blocks.grid.at_start()
    def _():
        state_ref[...] = blocks.spread(s_ref, 0)

    def visit(rows, _, token):
        a, b = a_ref[rows, :].astype(F32), b_ref[rows, :].astype(F32)
        if blocks.grid.ragged:  # a token past the end leaves the state as it is
            a, b = jnp.where(token < blocks.T, a, 1.0), jnp.where(token < blocks.T, b, 0.0)
        a_tile_ref[...], b_tile_ref[...] = a, b
        h, out = state_ref[...], blocks.column()
        for r in blocks.rows():
            h = blocks.kept(blocks.spread(a_tile_ref, r), h) + blocks.spread(b_tile_ref, r)
            out.put(r, h)
        state_ref[...] = h
        h_ref[rows, :] = out.tile().astype(h_ref.dtype)

    blocks.each_tile(visit)

    @blocks.grid.at_end()
    def _():
        last_ref[...] = state_ref[0:1, :]


def _backward_kernel(
    blocks: _Blocks, *, a_ref, h_ref, outside_ref, dh_ref, s_ref, dlast_ref,
    da_ref, db_ref, ds_ref, carry_ref, a_tile_ref, dh_tile_ref,
):  # fmt: skip
    """carry = a_{t+1} g_{t+1}, what the token just visited sends to the one before it."""

    @blocks.grid.at_start()
    def _():
        carry_ref[...] = blocks.spread(dlast_ref, 0)

    backwards, time = blocks.grid.backwards, blocks.tiling.time
    first_token = 0 if backwards else blocks.T - 1  # of the recurrence: it read s
    in_tile = iota((ROWS, blocks.tiling.channels), 0)

    def visit(rows, row, token):
        a, dh, h = (ref[rows, :].astype(F32) for ref in (a_ref, dh_ref, h_ref))
        if blocks.grid.ragged:
            a, dh = jnp.where(token < blocks.T, a, 1.0), jnp.where(token < blocks.T, dh, 0.0)
        a_tile_ref[...], dh_tile_ref[...] = a, dh
        carry, out = carry_ref[...], blocks.column()
        for r in blocks.rows():
            g = blocks.spread(dh_tile_ref, r) + carry
            out.put(r, g)
            carry = blocks.kept(blocks.spread(a_tile_ref, r), g)
        carry_ref[...] = carry
        g = out.tile()
        db_ref[rows, :] = g.astype(db_ref.dtype)

        # The h that each token read: the tile moved by a token, and one row from the tile that comes next.
        at_edge = row == 0 if backwards else row == time - ROWS
        inside = pl.multiple_of(
            jnp.maximum(row - ROWS, 0) if backwards else jnp.minimum(row + ROWS, time - ROWS), ROWS
        )
        edge = ROWS - 1 if backwards else 0
        beside = jnp.where(at_edge, outside_ref[...].astype(F32), h_ref[pl.ds(inside, ROWS), :].astype(F32))
        read = pltpu.roll(h, 1 if backwards else ROWS - 1, 0)
        read = jnp.where(in_tile == (ROWS - 1 - edge), beside[edge : edge + 1], read)
        read = jnp.where(token == first_token, s_ref[...], read)
        da_ref[rows, :] = (g * read).astype(da_ref.dtype)

    blocks.each_tile(visit)

    @blocks.grid.at_end()
    def _():
        ds_ref[...] = carry_ref[0:1, :]
