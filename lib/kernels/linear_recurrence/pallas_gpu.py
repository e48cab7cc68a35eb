"""The recurrence on Hopper: a warpgroup walks CHANNELS channels of one sequence, one channel a thread.

Tiles of TOKENS tokens come by TMA, two at a time: the next one travels while a thread walks down its column
of this one with the state in a register. Results leave by TMA as well. The gradient is the same walk from the
other end, g_t = dh_t + a_{t+1} g_{t+1}, with da_t = g_t h_{t-1} beside it; h's row before a tile is a copy of
its own.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import compat
from ..common.arguments import pad_to, trim
from ..common.chips import WARPGROUP
from ..common.hopper import F32, Pipeline, launch
from ..common.tiling import round_up
from .inputs import Inputs

TOKENS = 32
CHANNELS = WARPGROUP  # one a thread
SLOTS = 2


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    for x in (call.a, call.b):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"the GPU kernel reads float32 and bfloat16, not {x.dtype}"
    return compat.local_gpu_lacks_mosaic()


def forward(call: Inputs, reverse: bool, *, interpret: bool) -> tuple[Array, Array]:
    """h [B, T, D] in b's dtype and the last state [B, D] in float32."""
    a, b, s = _pad(call.a, reverse, 1.0), _pad(call.b, reverse), _pad_channels(call.initial_state)
    B, T, D = b.shape
    pipeline = Pipeline(T // TOKENS, SLOTS, ahead=SLOTS, backwards=reverse)

    def body(a_ref, b_ref, s_ref, h_ref, last_ref, *, a_tile, b_tile, h_tile, row, arrived, row_arrived):
        batch, channels = lax.axis_index("b"), _channels()

        def fetch(tile, slot):
            for ref, smem in ((a_ref, a_tile), (b_ref, b_tile)):
                place = ref.at[batch, _tokens(tile), channels]
                plgpu.copy_gmem_to_smem(place, smem.at[slot], arrived.at[slot])

        pipeline.start(fetch)
        plgpu.copy_gmem_to_smem(s_ref.at[batch, channels], row, row_arrived)
        plgpu.barrier_wait(row_arrived)

        def visit(_, slot, h):
            for rows in _groups(reverse):
                reads = [(a_tile[slot, r].astype(F32), b_tile[slot, r].astype(F32)) for r in rows]
                for r, (a, b) in zip(rows, reads, strict=True):
                    h = _kept(a, h, call) + b
                    h_tile[slot, r] = h.astype(h_tile.dtype)
            return h

        def store(tile, slot):
            plgpu.copy_smem_to_gmem(h_tile.at[slot], h_ref.at[batch, _tokens(tile), channels])

        row[...] = pipeline.walk(fetch, visit, store, row[...], arrived=arrived, stores=1)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row, last_ref.at[batch, channels])
        plgpu.wait_smem_to_gmem(0)

    h, state = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(b.shape, b.dtype), jax.ShapeDtypeStruct((B, D), F32)),
        scratch_types=dict(
            a_tile=_tile(a.dtype),
            b_tile=_tile(b.dtype),
            h_tile=_tile(b.dtype),
            row=plgpu.SMEM((CHANNELS,), F32),
            arrived=plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            row_arrived=plgpu.Barrier(),
        ),
        grid=(B, D // CHANNELS),
        grid_names=("b", "d"),
        **launch("linear_recurrence", interpret=interpret),
    )(a, b, s)
    return _trim(h, call.b.shape, reverse), state[:, : call.b.shape[2]]


def backward(
    call: Inputs, h: Array, cotangents: tuple[Array, Array], reverse: bool, *, interpret: bool
) -> Inputs:
    """The gradients, as `Inputs`."""
    shape = h.shape
    a, h, dh = _pad(call.a, reverse, 1.0), _pad(h, reverse), _pad(cotangents[0], reverse)
    s, dlast = _pad_channels(call.initial_state), _pad_channels(cotangents[1])
    B, T, D = h.shape
    backwards = not reverse
    pipeline = Pipeline(T // TOKENS, SLOTS, ahead=SLOTS, backwards=backwards)

    def body(
        a_ref, h_ref, dh_ref, s_ref, dlast_ref,
        da_ref, db_ref, ds_ref,
        *, a_tile, h_tile, dh_tile, da_tile, db_tile, edge, before, s_row, row, arrived, row_arrived,
    ):  # fmt: skip
        batch, channels = lax.axis_index("b"), _channels()

        def fetch(tile, slot):
            tokens = _tokens(tile)
            for ref, smem in ((a_ref, a_tile), (h_ref, h_tile), (dh_ref, dh_tile)):
                plgpu.copy_gmem_to_smem(ref.at[batch, tokens, channels], smem.at[slot], arrived.at[slot])
            start = tokens.start
            token = lax.max(start - 1, 0) if backwards else lax.min(start + TOKENS, T - 1)
            plgpu.copy_gmem_to_smem(h_ref.at[batch, token, channels], edge.at[slot], arrived.at[slot])

        pipeline.start(fetch)
        plgpu.copy_gmem_to_smem(s_ref.at[batch, channels], s_row, row_arrived)
        plgpu.copy_gmem_to_smem(dlast_ref.at[batch, channels], row, row_arrived)
        plgpu.barrier_wait(row_arrived)

        def visit(step, slot, carry):
            """carry = a_{t+1} g_{t+1}, what the token just visited sends to the one before it."""

            @pl.when(step < pipeline.steps - 1)
            def _():
                before[...] = edge[slot].astype(F32)

            @pl.when(step == pipeline.steps - 1)
            def _():
                before[...] = s_row[...]

            for rows in _groups(backwards):
                reads = [[tile[slot, r].astype(F32) for tile in (a_tile, dh_tile)] for r in rows]
                states = [h_tile[slot, r + (-1 if backwards else 1)].astype(F32) for r in rows[:-1]]
                last = rows[-1] + (-1 if backwards else 1)
                states.append(h_tile[slot, last].astype(F32) if 0 <= last < TOKENS else before[...])
                for r, (a, dh), h in zip(rows, reads, states, strict=True):
                    g = dh + carry
                    carry = _kept(a, g, call)
                    da_tile[slot, r] = (g * h).astype(da_tile.dtype)
                    db_tile[slot, r] = g.astype(db_tile.dtype)
            return carry

        def store(tile, slot):
            for smem, ref in ((da_tile, da_ref), (db_tile, db_ref)):
                plgpu.copy_smem_to_gmem(smem.at[slot], ref.at[batch, _tokens(tile), channels])

        row[...] = pipeline.walk(fetch, visit, store, row[...], arrived=arrived, stores=2)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row, ds_ref.at[batch, channels])
        plgpu.wait_smem_to_gmem(0)

    da, db, ds = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(a.shape, a.dtype),
            jax.ShapeDtypeStruct(h.shape, h.dtype),
            jax.ShapeDtypeStruct((B, D), F32),
        ),
        scratch_types=dict(
            a_tile=_tile(a.dtype),
            h_tile=_tile(h.dtype),
            dh_tile=_tile(h.dtype),
            da_tile=_tile(a.dtype),
            db_tile=_tile(h.dtype),
            edge=plgpu.SMEM((SLOTS, CHANNELS), h.dtype),
            before=plgpu.SMEM((CHANNELS,), F32),
            s_row=plgpu.SMEM((CHANNELS,), F32),
            row=plgpu.SMEM((CHANNELS,), F32),
            arrived=plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
            row_arrived=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(B, D // CHANNELS),
        grid_names=("b", "d"),
        **launch("linear_recurrence_backward", interpret=interpret),
    )(a, h, dh, s, dlast)
    return Inputs(_trim(da, shape, reverse), _trim(db, shape, reverse), ds[:, : shape[2]], None)


def _kept(a: Array, h: Array, call: Inputs) -> Array:
    """a h; between documents a zero forgets NaN and infinity too."""
    return a * h if call.starts is None else jnp.where(a == 0.0, 0.0, a * h)


def _tile(dtype):
    return plgpu.SMEM((SLOTS, TOKENS, CHANNELS), dtype)


def _channels():
    return pl.ds(lax.axis_index("d") * CHANNELS, CHANNELS)


def _tokens(tile):
    return pl.ds(tile * TOKENS, TOKENS)


def _groups(backwards: bool) -> list[range]:
    """A tile's rows in the order of the walk; a group is read before it is written, so that reads overlap."""
    return [
        range(i + 7, i - 1, -1) if backwards else range(i, i + 8)
        for i in sorted(range(0, TOKENS, 8), reverse=backwards)
    ]


def _pad(x: Array, reverse: bool, with_value: float = 0.0) -> Array:
    """Whole tiles. Tokens are added where the recurrence ends: a = 1 and b = 0 there keep its state."""
    B, T, D = x.shape
    shape = (B, round_up(T, TOKENS), round_up(D, CHANNELS))
    return jnp.flip(pad_to(jnp.flip(x, 1), shape, with_value), 1) if reverse else pad_to(x, shape, with_value)


def _pad_channels(x: Array) -> Array:
    return pad_to(x, (x.shape[0], round_up(x.shape[1], CHANNELS)))


def _trim(x: Array, shape: tuple[int, ...], reverse: bool) -> Array:
    return trim(x[:, x.shape[1] - shape[1] :] if reverse else x, shape)
