"""Mosaic GPU kernels: the state at every chunk's edge, and the outputs from those states.

Both run in either direction. Forward, with (x, z, y) = (q, k, v), they give the outputs. Backward, with
(x, z, y) = (k, q, d_out), they give the states' gradients and then d_v, which is the same sum over the tokens
after each token instead of those before it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.hopper import COLS, F32, ROWS, Pipeline, along_columns, along_rows, launch, swizzled
from .pallas_gpu_tiles import (
    CHUNK,
    LEVELS,
    SQUARE,
    ChunkTiles,
    after,
    is_query,
    only,
    opposite,
    towards_border,
    up_to,
)
from .tiling_gpu import Tiling


def log_decay_scratch(log_decay: Array | None, slots: tuple[int, ...], dtype) -> dict:
    """Buffers for a tile of log-decays per channel, and for the parts that the tensor cores add up."""
    if log_decay is None:
        return {}
    parts = 1 if log_decay.dtype == jnp.bfloat16 else 2
    return dict(
        decay=swizzled((*slots, CHUNK, 64), log_decay.dtype),
        parts=[swizzled((CHUNK, 64), dtype) for _ in range(parts)],
    )


def states(
    x: Array,
    y: Array,
    log_decay: Array | None,
    rows: Array,
    initial: Array | None,
    *,
    reverse: bool,
    exclusive: bool,
    heads: int,
    tiling: Tiling,
    interpret: bool,
) -> tuple[Array, Array]:
    """S <- decay S + (x weighed)^T y, chunk by chunk.

    Args:
      x: [B, T, Hx, K], y: [B, T, Hy, V], T a multiple of CHUNK, K and V of 64.
      log_decay: [B, T, H, K] where the decay differs by channel, else None (`rows` has it all).
      rows: float32 [B, 1 or H, T / CHUNK, 2, CHUNK]: the weight of each token, and the chunk's own decay
        (the same at each token), of what does not differ by channel.
      initial: [B, H, K, V] float32, or None for zeros.
      reverse: walk from the last chunk to the first; the weight of a token is then the decay from the chunk's
        start up to it instead of the decay after it.
      exclusive: reverse only: without the token's own decay.

    Returns:
      The state before each chunk (in the walk's order), [B, H, T / CHUNK, K, V] in x's dtype, and the state
      after the last, [B, H, K, V] float32.
    """
    B, T, _, K = x.shape
    V = y.shape[-1]
    steps = T // CHUNK
    wide = tiling.state_values
    tile = (64, wide)
    group_x, group_y, group_rows = heads // x.shape[2], heads // y.shape[2], heads // rows.shape[1]
    tiles = ChunkTiles(interpret)
    stages = min(steps, tiling.stages)
    pipeline = Pipeline(steps, stages, ahead=stages - 1, backwards=reverse)
    scratch = dict(
        x_tile=swizzled((stages, CHUNK, 64), x.dtype),
        y_tile=swizzled((stages, CHUNK, wide), x.dtype),
        row_tile=plgpu.SMEM((stages, 2, CHUNK), F32),
        weighed=swizzled((CHUNK, wide if log_decay is None else 64), x.dtype),
        state_tile=swizzled(tile, x.dtype),
        arrived=plgpu.Barrier(num_arrivals=3 if log_decay is None else 4, num_barriers=stages),
        **log_decay_scratch(log_decay, (stages,), x.dtype),
    )
    if log_decay is not None:
        scratch["ones"] = swizzled((CHUNK, 64), x.dtype)
    operands = [a for a in (x, y, rows, log_decay, initial) if a is not None]

    def body(*refs):
        refs = list(refs)
        x_ref, y_ref, row_ref = (refs.pop(0) for _ in range(3))
        decay_ref = refs.pop(0) if log_decay is not None else None
        initial_ref = refs.pop(0) if initial is not None else None
        states_ref, last_ref = refs
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "block"))
        keys = pl.ds(lax.div(block, V // wide) * 64, 64)
        values = pl.ds(lax.rem(block, V // wide) * wide, wide)

        def read_edge(edge, arrived):
            plgpu.copy_gmem_to_smem(initial_ref.at[b, h, keys, values], edge, arrived)
            plgpu.barrier_wait(arrived)
            state = tiles.load(edge)
            plgpu.commit_smem()  # every warp has read before the memory is used again
            return state

        def walk(state, x_tile, y_tile, row_tile, weighed, state_tile, arrived, **decays):
            def fetch(chunk, slot):
                when, barrier = pl.ds(chunk * CHUNK, CHUNK), arrived.at[slot]
                plgpu.copy_gmem_to_smem(
                    x_ref.at[b, when, lax.div(h, group_x), keys], x_tile.at[slot], barrier
                )
                plgpu.copy_gmem_to_smem(
                    y_ref.at[b, when, lax.div(h, group_y), values], y_tile.at[slot], barrier
                )
                plgpu.copy_gmem_to_smem(
                    row_ref.at[b, lax.div(h, group_rows), chunk], row_tile.at[slot], barrier
                )
                if decay_ref is not None:
                    plgpu.copy_gmem_to_smem(decay_ref.at[b, when, h, keys], decays["decay"].at[slot], barrier)

            pipeline.start(fetch)
            if decay_ref is not None:
                decays["ones"][...] = tiles.full((CHUNK, 64), 1, x.dtype)
                plgpu.commit_smem()

            def one(step, state):
                slot = pipeline.slot(step)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                state_tile[...] = state.astype(x.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(state_tile, states_ref.at[b, h, pipeline.at(step), keys, values])
                pipeline.refill(step, fetch)
                plgpu.barrier_wait(arrived.at[slot])
                weight = tiles.load(row_tile.at[slot, 0], ROWS)
                keep = tiles.load(row_tile.at[slot, 1], ROWS)
                if decay_ref is None:
                    y_scaled = tiles.load(y_tile.at[slot]) * along_rows(weight, (CHUNK, wide))
                    weighed[...] = y_scaled.astype(x.dtype)
                    pair = tiles.transposed(x_tile.at[slot]), weighed
                else:
                    parts = decays["parts"]
                    tiles.split(tiles.load(decays["decay"].at[slot]), parts)
                    plgpu.commit_smem()
                    i, s = tiles.row_and_column()
                    to_edge = up_to(i, s, exclusive) if reverse else after(i, s)
                    factor = tiles.decays(to_edge, parts) * along_rows(weight, SQUARE)
                    weighed[...] = (tiles.load(x_tile.at[slot]) * factor).astype(x.dtype)
                    pair = tiles.transposed(weighed), y_tile.at[slot]
                    sums = ((tiles.transposed(part), decays["ones"]) for part in parts)
                    total = tiles.multiply(SQUARE, *sums)
                    keep = keep * jnp.exp2(jnp.max(total, axis=1))
                plgpu.commit_smem()
                return tiles.add_products(state * along_rows(keep, tile), pair)

            state = lax.fori_loop(0, steps, one, state)
            plgpu.wait_smem_to_gmem(0)
            return state

        def write_edge(edge):
            edge[...] = state
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(edge, last_ref.at[b, h, keys, values])
            plgpu.wait_smem_to_gmem(0)

        # One after the other, so that the three share their memory.
        state = tiles.full(tile, 0)
        if initial is not None:
            state = pl.run_scoped(read_edge, swizzled(tile, F32), plgpu.Barrier())
        state = pl.run_scoped(partial(walk, state), **scratch)
        pl.run_scoped(write_edge, swizzled(tile, F32))

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, heads, steps, K, V), x.dtype),
            jax.ShapeDtypeStruct((B, heads, K, V), F32),
        ),
        grid=(B, heads, K // 64 * (V // wide)),
        grid_names=("b", "h", "block"),
        **launch(
            "linear_attention_states" + ("_reverse" if reverse else ""), interpret=interpret, approx_math=True
        ),
    )(*operands)


def outputs(
    x: Array,
    z: Array,
    y: Array,
    log_decay: Array | None,
    bonus: Array | None,
    rows: Array,
    states: Array,
    scale: float,
    *,
    reverse: bool,
    packed: bool,
    tiling: Tiling,
    interpret: bool,
) -> Array:
    """weight * (x decayed) S + scale * (the chunk's decayed scores of x and z) y, every chunk by itself.

    Args:
      x, z: [B, T, Hx, K], [B, T, Hz, K]: queries and keys, or keys and queries if `reverse`.
      y: [B, T, Hy, V].
      log_decay: [B, T, H, K] or None, as in `states`.
      bonus: [H, K] float32 or None. With it a query reads the state before its own decay.
      rows: float32 [B, 1 or H, T / CHUNK, 4, CHUNK]: for each token the weight of what the state gives, the
        sums of log-decays from the chunk's start to the token as a query and as a key (zeros where the decay
        differs by channel), and the number of its run.
      states: [B, H, T / CHUNK, K, V], from `states`.
      reverse: sum over the tokens after each token instead of those before.
      packed: whether runs differ.

    Returns:
      [B, T, H, V] in y's dtype.
    """
    B, T, _, K = x.shape
    H, V = states.shape[1], y.shape[-1]
    wide = tiling.output_values
    tile = (CHUNK, wide)
    per_channel = log_decay is not None
    diagonal_apart = per_channel or bonus is not None
    groups = [H // a.shape[2] for a in (x, z, y)]
    group_rows = H // rows.shape[1]
    tiles = ChunkTiles(interpret)
    scratch = dict(
        x_tile=swizzled(SQUARE, x.dtype),
        z_tile=swizzled(SQUARE, x.dtype),
        state_tile=swizzled(tile, x.dtype),
        y_tile=swizzled(tile, x.dtype),
        row_tile=plgpu.SMEM((4, CHUNK), F32),
        arrived=plgpu.Barrier(num_arrivals=3 + per_channel + (bonus is not None)),
        rest_arrived=plgpu.Barrier(num_arrivals=2),
        **log_decay_scratch(log_decay, (), x.dtype),
    )
    if per_channel:
        scratch["scaled"] = swizzled(SQUARE, x.dtype)
        scratch["tokens"] = plgpu.SMEM((CHUNK,), jnp.int32)
    if bonus is not None:
        scratch["bonus_tile"] = plgpu.SMEM((64,), F32)
    operands = [a for a in (x, z, y, rows, states, log_decay, bonus) if a is not None]

    def body(*refs, x_tile, z_tile, y_tile, state_tile, row_tile, arrived, rest_arrived, **more):
        refs = list(refs)
        x_ref, z_ref, y_ref, row_ref, state_ref = (refs.pop(0) for _ in range(5))
        decay_ref = refs.pop(0) if per_channel else None
        bonus_ref = refs.pop(0) if bonus is not None else None
        (out_ref,) = refs
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "block"))
        chunk = lax.div(block, V // wide)
        values = pl.ds(lax.rem(block, V // wide) * wide, wide)
        when = pl.ds(chunk * CHUNK, CHUNK)
        head_x, head_z, head_y = (lax.div(h, group) for group in groups)

        plgpu.copy_gmem_to_smem(y_ref.at[b, when, head_y, values], y_tile, rest_arrived)
        plgpu.copy_gmem_to_smem(row_ref.at[b, lax.div(h, group_rows), chunk], row_tile, rest_arrived)
        plgpu.barrier_wait(rest_arrived)
        weight = tiles.load(row_tile.at[0], ROWS)
        if per_channel:
            tiles.number(more["tokens"])
        i, j = tiles.row_and_column()
        before = i < j if reverse else j < i  # [i, j]: row i sums over column j

        def one(step, sums):
            scores, out, diagonal = sums
            keys = pl.ds(step * 64, 64)
            plgpu.copy_gmem_to_smem(x_ref.at[b, when, head_x, keys], x_tile, arrived)
            plgpu.copy_gmem_to_smem(z_ref.at[b, when, head_z, keys], z_tile, arrived)
            plgpu.copy_gmem_to_smem(state_ref.at[b, h, chunk, keys, values], state_tile, arrived)
            if per_channel:
                plgpu.copy_gmem_to_smem(decay_ref.at[b, when, h, keys], more["decay"], arrived)
            if bonus is not None:
                plgpu.copy_gmem_to_smem(bonus_ref.at[h, keys], more["bonus_tile"], arrived)
            plgpu.barrier_wait(arrived)
            if diagonal_apart:
                xz = tiles.load(x_tile) * tiles.load(z_tile)
                if bonus is not None:
                    xz = xz * along_columns(tiles.load(more["bonus_tile"], COLS), SQUARE)
                diagonal = diagonal + jnp.sum(xz, axis=1)
            if not per_channel:
                scores, out = tiles.add_each(
                    (scores, (x_tile, tiles.transposed(z_tile))), (out, (x_tile, state_tile))
                )
                plgpu.commit_smem()  # every warp is done with the tiles before the next ones are copied there
                return scores, out, diagonal
            parts, scaled = more["parts"], more["scaled"]
            tiles.split(tiles.load(more["decay"]), parts)
            plgpu.commit_smem()
            to_edge = after(i, j) if reverse else up_to(i, j, bonus is not None)
            factor = tiles.decays(to_edge, parts) * along_rows(weight, SQUARE)
            decayed = (tiles.load(x_tile) * factor).astype(x.dtype)
            out = tiles.add_products(out, (decayed, state_tile))
            as_query, as_key = (z_tile, x_tile) if reverse else (x_tile, z_tile)

            def add_level(level, scores):
                token = tiles.cast(more["tokens"][...], ROWS)
                query = is_query(token, level)
                factor = tiles.decays(towards_border(token, level, bonus is not None).holds(j), parts)
                row = jnp.where(along_rows(query, SQUARE), tiles.load(as_query), tiles.load(as_key))
                scaled_rows = (row * factor).astype(x.dtype)
                scaled[...] = scaled_rows
                plgpu.commit_smem()
                pairs = tiles.multiply(SQUARE, (scaled_rows, tiles.transposed(scaled)))
                seen = only(~query if reverse else query, opposite(token, level)).holds(j)
                return scores + jnp.where(seen, pairs, 0)

            scores = lax.fori_loop(0, LEVELS, add_level, scores)
            plgpu.commit_smem()
            return scores, out, diagonal

        sums = tiles.full(SQUARE, 0), tiles.full(tile, 0), tiles.cast(jnp.zeros((CHUNK,), F32), ROWS)
        scores, out, diagonal = lax.fori_loop(0, K // 64, one, sums)
        seen = before if diagonal_apart else before | (i == j)
        if packed:
            runs = tiles.load(row_tile.at[3], ROWS), tiles.load(row_tile.at[3], COLS)
            seen = seen & (along_rows(runs[0], SQUARE) == along_columns(runs[1], SQUARE))
        if not per_channel:
            out = out * along_rows(weight, tile)
            as_query, as_key = (
                tiles.load(row_tile.at[n], COLS if reverse == (n == 1) else ROWS) for n in (1, 2)
            )
            if reverse:
                exponent = along_columns(as_query, SQUARE) - along_rows(as_key, SQUARE)
            else:
                exponent = along_rows(as_query, SQUARE) - along_columns(as_key, SQUARE)
            scores = scores * jnp.exp(jnp.where(seen, exponent, -jnp.inf))
        elif packed:
            scores = jnp.where(seen, scores, 0)
        if diagonal_apart:
            scores = jnp.where(i == j, along_rows(diagonal, SQUARE), scores)
        out = tiles.add_products(out, ((scores * scale).astype(x.dtype), y_tile))
        y_tile[...] = out.astype(x.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile, out_ref.at[b, when, h, values])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((B, T, H, V), y.dtype),
        scratch_types=scratch,
        grid=(B, H, T // CHUNK * (V // wide)),
        grid_names=("b", "h", "block"),
        **launch(
            "linear_attention_outputs" + ("_reverse" if reverse else ""),
            interpret=interpret,
            approx_math=True,
        ),
    )(*operands)
