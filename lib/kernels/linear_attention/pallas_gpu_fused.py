"""Mosaic GPU kernel: states and outputs in one walk, for one decay a head and enough heads to fill the chip.

It reads each input once and keeps the state on the processor. Like pallas_gpu_forward it runs in either
direction: with (x, z, y) = (q, k, v) for the outputs, with (k, q, d_out) for d_v and the states' gradients.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.hopper import COLS, F32, ROWS, Pipeline, along_columns, along_rows, launch, swizzled
from .pallas_gpu_tiles import CHUNK, SQUARE, ChunkTiles

WIDE = 64  # channels of y that one program works on


def walk(
    x: Array,
    z: Array,
    y: Array,
    rows: Array,
    initial: Array | None,
    scale: float,
    *,
    heads: int,
    reverse: bool,
    packed: bool,
    interpret: bool,
) -> tuple[Array, Array, Array | None]:
    """out = weight * x S + scale * (the chunk's decayed scores of x, z) y, and S <- keep S + z^T (weighed y).

    Args:
      x, z, y: [B, T, Hx, K], [B, T, Hz, K], [B, T, Hy, V]; T a multiple of CHUNK, K and V of 64, K <= 128.
      rows: float32 [B, 1 or H, T / CHUNK, 6, CHUNK]: for each token the weight of what the state gives, the
        sums of log-decays up to it as a query and as a key, its run, its weight in the state, and the chunk's
        decay.
      initial: [B, H, K, V] float32, or None for zeros.
      reverse: walk from the last chunk to the first, return the states too, and sum over later tokens.
      packed: whether runs differ.

    Returns:
      out [B, T, H, V] in y's dtype; the state after the last chunk of the walk, [B, H, K, V] float32; and, if
      `reverse`, the state before each chunk in the walk's order, [B, H, T / CHUNK, K, V] in x's dtype.
    """
    B, T, _, K = x.shape
    V, steps = y.shape[-1], T // CHUNK
    tile, state_shape = (CHUNK, WIDE), (K, WIDE)
    stages = min(2, steps)
    pipeline = Pipeline(steps, stages, ahead=1, backwards=reverse)
    groups = [heads // a.shape[2] for a in (x, z, y)]
    group_rows = heads // rows.shape[1]
    tiles = ChunkTiles(interpret)
    scratch = dict(
        x_tile=swizzled((stages, CHUNK, K), x.dtype),
        z_tile=swizzled((stages, CHUNK, K), x.dtype),
        y_tile=swizzled((stages, *tile), x.dtype),
        row_tile=plgpu.SMEM((stages, 6, CHUNK), F32),
        weighed=swizzled(tile, x.dtype),
        state_tile=swizzled(state_shape, x.dtype),
        arrived=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
    )
    operands = [a for a in (x, z, y, rows, initial) if a is not None]

    def body(*refs):
        refs = list(refs)
        x_ref, z_ref, y_ref, row_ref = (refs.pop(0) for _ in range(4))
        initial_ref = refs.pop(0) if initial is not None else None
        out_ref, last_ref = refs[:2]
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "block"))
        values = pl.ds(block * WIDE, WIDE)
        head_x, head_z, head_y = (lax.div(h, group) for group in groups)

        def read_edge(edge, arrived):
            plgpu.copy_gmem_to_smem(initial_ref.at[b, h, :, values], edge, arrived)
            plgpu.barrier_wait(arrived)
            state = tiles.load(edge)
            plgpu.commit_smem()  # every warp has read before the memory is used again
            return state

        def over_chunks(state, x_tile, z_tile, y_tile, row_tile, weighed, state_tile, arrived):
            def fetch(chunk, slot):
                when, barrier = pl.ds(chunk * CHUNK, CHUNK), arrived.at[slot]
                plgpu.copy_gmem_to_smem(x_ref.at[b, when, head_x], x_tile.at[slot], barrier)
                plgpu.copy_gmem_to_smem(z_ref.at[b, when, head_z], z_tile.at[slot], barrier)
                plgpu.copy_gmem_to_smem(y_ref.at[b, when, head_y, values], y_tile.at[slot], barrier)
                plgpu.copy_gmem_to_smem(
                    row_ref.at[b, lax.div(h, group_rows), chunk], row_tile.at[slot], barrier
                )

            pipeline.start(fetch)

            def one(step, state):
                slot, chunk = pipeline.slot(step), pipeline.at(step)
                # The copies out of state_tile and of the other slot of y_tile have read them.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pipeline.refill(step, fetch)
                state_tile[...] = state.astype(x.dtype)
                plgpu.barrier_wait(arrived.at[slot])
                row = row_tile.at[slot]
                weight, writing = tiles.load(row.at[0], ROWS), tiles.load(row.at[4], ROWS)
                weighed[...] = (tiles.load(y_tile.at[slot]) * along_rows(writing, tile)).astype(x.dtype)
                plgpu.commit_smem()
                if reverse:
                    plgpu.copy_smem_to_gmem(state_tile, refs[2].at[b, h, chunk, :, values])
                scores, out = tiles.add_each(
                    (tiles.full(SQUARE, 0), (x_tile.at[slot], tiles.transposed(z_tile.at[slot]))),
                    (tiles.full(tile, 0), (x_tile.at[slot], state_tile)),
                )
                i, j = tiles.row_and_column()
                seen = i <= j if reverse else j <= i
                if packed:
                    runs = tiles.load(row.at[3], ROWS), tiles.load(row.at[3], COLS)
                    seen = seen & (along_rows(runs[0], SQUARE) == along_columns(runs[1], SQUARE))
                if reverse:
                    exponent = along_columns(tiles.load(row.at[1], COLS), SQUARE)
                    exponent = exponent - along_rows(tiles.load(row.at[2], ROWS), SQUARE)
                else:
                    exponent = along_rows(tiles.load(row.at[1], ROWS), SQUARE)
                    exponent = exponent - along_columns(tiles.load(row.at[2], COLS), SQUARE)
                scores = scores * jnp.exp(jnp.where(seen, exponent, -jnp.inf)) * scale
                out, state = tiles.add_each(
                    (out * along_rows(weight, tile), (scores.astype(x.dtype), y_tile.at[slot])),
                    (state * row_tile[slot, 5, 0], (tiles.transposed(z_tile.at[slot]), weighed)),
                )
                y_tile.at[slot][...] = out.astype(x.dtype)
                plgpu.commit_smem()
                when = pl.ds(chunk * CHUNK, CHUNK)
                plgpu.copy_smem_to_gmem(y_tile.at[slot], out_ref.at[b, when, h, values])
                return state

            return lax.fori_loop(0, steps, one, state)

        def write_edge(edge):
            edge[...] = state
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(edge, last_ref.at[b, h, :, values])
            plgpu.wait_smem_to_gmem(0)

        # One after the other, so that the three share their memory.
        state = tiles.full(state_shape, 0)
        if initial is not None:
            state = pl.run_scoped(read_edge, swizzled(state_shape, F32), plgpu.Barrier())
        state = pl.run_scoped(partial(over_chunks, state), **scratch)
        plgpu.wait_smem_to_gmem(0)
        pl.run_scoped(write_edge, swizzled(state_shape, F32))

    out_type = [
        jax.ShapeDtypeStruct((B, T, heads, V), y.dtype),
        jax.ShapeDtypeStruct((B, heads, K, V), F32),
    ]
    if reverse:
        out_type.append(jax.ShapeDtypeStruct((B, heads, steps, K, V), x.dtype))
    out, last, *states = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=(B, heads, V // WIDE),
        grid_names=("b", "h", "block"),
        **launch(
            "linear_attention_walk" + ("_reverse" if reverse else ""), interpret=interpret, approx_math=True
        ),
    )(*operands)
    return out, last, states[0] if reverse else None
