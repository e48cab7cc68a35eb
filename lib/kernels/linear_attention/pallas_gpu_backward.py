"""Mosaic GPU kernel: the gradients of queries, keys and decays, every chunk and block of channels by itself.

It differentiates the sums of pallas_gpu_forward term by term. Every term of d_log_decay is a sum of products
q . d_q or k . d_k over exactly the pairs whose decay the token takes part in, never a difference of longer
sums, so gates that leave nothing of the past get the tiny gradients they should.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.hopper import COLS, F32, ROWS, along_columns, along_rows, launch, swizzled
from .pallas_gpu_forward import log_decay_scratch
from .pallas_gpu_tiles import (
    CHUNK,
    LEVELS,
    SQUARE,
    ChunkTiles,
    after,
    is_query,
    opposite,
    towards_border,
    up_to,
)


def gradients(
    q: Array,
    k: Array,
    v: Array,
    d_out: Array,
    log_decay: Array | None,
    bonus: Array | None,
    rows: Array,
    states: Array,
    d_states: Array,
    scale: float,
    *,
    packed: bool,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """d_q, d_k, and what d_log_decay is made of.

    Args:
      q, k, v: [B, T, Hq, K], [B, T, Hk, K], [B, T, Hv, V]; d_out: [B, T, H, V].
      log_decay: [B, T, H, K] or None; bonus: [H, K] float32 or None.
      rows: float32 [B, 1 or H, T / CHUNK, 6, CHUNK]: for each token the weights of q (with the scale) and k,
        the chunk's own decay, the sums of log-decays up to the token as a query and as a key, and its run.
      states, d_states: [B, H, T / CHUNK, K, V]: the state before each chunk, the gradient of that after it.
      packed: whether runs differ.

    Returns:
      d_q and d_k, [B, T, H, K], in float32 where heads are yet to be summed, else in q's dtype; and
      d_log_decay [B, T, H, K] in log_decay's dtype, or, where the decay is one a head, its parts, float32
      [B, H, T / CHUNK, K / 64, 4, CHUNK]: of each token as a query; as a key inside the chunk, negative; as
      a key beyond it; and of the state that passes the chunk, as 64 partial sums.
    """
    B, T, _, K = q.shape
    H, V = d_out.shape[2], d_out.shape[3]
    per_channel, exclusive = log_decay is not None, bonus is not None
    groups = [H // a.shape[2] for a in (q, k, v)]
    group_rows = H // rows.shape[1]
    tiles = ChunkTiles(interpret)
    d_types = [q.dtype if group == 1 else F32 for group in groups[:2]]
    scratch = dict(
        q_tile=swizzled(SQUARE, q.dtype),
        k_tile=swizzled(SQUARE, q.dtype),
        v_tile=swizzled(SQUARE, q.dtype),
        d_out_tile=swizzled(SQUARE, q.dtype),
        state_tile=swizzled(SQUARE, q.dtype),
        d_state_tile=swizzled(SQUARE, q.dtype),
        d_tiles=[swizzled(SQUARE, dtype) if dtype == F32 else None for dtype in d_types],
        row_tile=plgpu.SMEM((6, CHUNK), F32),
        sums_tile=plgpu.SMEM((4, CHUNK), F32),
        arrived=plgpu.Barrier(num_arrivals=3 + per_channel + exclusive),
        values_arrived=plgpu.Barrier(num_arrivals=4),
        **log_decay_scratch(log_decay, (), q.dtype),
    )
    if per_channel:
        scratch["scaled"] = swizzled(SQUARE, q.dtype)
        scratch["tokens"] = plgpu.SMEM((CHUNK,), jnp.int32)
    if exclusive:
        scratch["bonus_tile"] = plgpu.SMEM((64,), F32)
    scratch["d_tiles"] = [tile for tile in scratch["d_tiles"] if tile is not None]
    operands = [a for a in (q, k, v, d_out, rows, states, d_states, log_decay, bonus) if a is not None]

    def body(
        *refs,
        q_tile,
        k_tile,
        v_tile,
        d_out_tile,
        state_tile,
        d_state_tile,
        d_tiles,
        row_tile,
        sums_tile,
        arrived,
        values_arrived,
        **more,
    ):
        refs, d_tiles = list(refs), list(d_tiles)
        q_ref, k_ref, v_ref, d_out_ref, row_ref, state_ref, d_state_ref = (refs.pop(0) for _ in range(7))
        decay_ref = refs.pop(0) if per_channel else None
        bonus_ref = refs.pop(0) if exclusive else None
        d_q_ref, d_k_ref, d_decay_ref = refs
        d_q_tile, d_k_tile = (
            d_tiles.pop(0) if dtype == F32 else tile
            for dtype, tile in zip(d_types, (q_tile, k_tile), strict=True)
        )
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "block"))
        key_block, chunk = lax.rem(block, K // 64), lax.div(block, K // 64)
        keys, when = pl.ds(key_block * 64, 64), pl.ds(chunk * CHUNK, CHUNK)
        head_q, head_k, head_v = (lax.div(h, group) for group in groups)

        plgpu.copy_gmem_to_smem(q_ref.at[b, when, head_q, keys], q_tile, arrived)
        plgpu.copy_gmem_to_smem(k_ref.at[b, when, head_k, keys], k_tile, arrived)
        plgpu.copy_gmem_to_smem(row_ref.at[b, lax.div(h, group_rows), chunk], row_tile, arrived)
        if per_channel:
            plgpu.copy_gmem_to_smem(decay_ref.at[b, when, h, keys], more["decay"], arrived)
        if exclusive:
            plgpu.copy_gmem_to_smem(bonus_ref.at[h, keys], more["bonus_tile"], arrived)

        def over_values(step, sums):
            d_lower, d_upper, d_query, d_key, passing = sums
            values = pl.ds(step * 64, 64)
            plgpu.copy_gmem_to_smem(v_ref.at[b, when, head_v, values], v_tile, values_arrived)
            plgpu.copy_gmem_to_smem(d_out_ref.at[b, when, h, values], d_out_tile, values_arrived)
            plgpu.copy_gmem_to_smem(state_ref.at[b, h, chunk, keys, values], state_tile, values_arrived)
            plgpu.copy_gmem_to_smem(d_state_ref.at[b, h, chunk, keys, values], d_state_tile, values_arrived)
            plgpu.barrier_wait(values_arrived)
            d_lower, d_upper, d_query, d_key = tiles.add_each(
                (d_lower, (d_out_tile, tiles.transposed(v_tile))),
                (d_upper, (v_tile, tiles.transposed(d_out_tile))),
                (d_query, (d_out_tile, tiles.transposed(state_tile))),
                (d_key, (v_tile, tiles.transposed(d_state_tile))),
            )
            passing = passing + jnp.sum(tiles.load(state_tile) * tiles.load(d_state_tile), axis=1)
            plgpu.commit_smem()  # every warp is done with the tiles before the next ones are copied there
            return d_lower, d_upper, d_query, d_key, passing

        zeros, nothing = tiles.full(SQUARE, 0), tiles.cast(jnp.zeros((CHUNK,), F32), ROWS)
        sums = lax.fori_loop(0, V // 64, over_values, (zeros, zeros, zeros, zeros, nothing))
        d_lower, d_upper, d_query, d_key, passing = sums

        plgpu.barrier_wait(arrived)
        i, j = tiles.row_and_column()
        weigh_query, weigh_key, keep = (tiles.load(row_tile.at[n], ROWS) for n in range(3))
        # Both triangles of one symmetric matrix: d_scores[i, j] at [i, j] and at [j, i].
        seen = i != j
        if packed:
            runs = tiles.load(row_tile.at[5], ROWS), tiles.load(row_tile.at[5], COLS)
            seen = seen & (along_rows(runs[0], SQUARE) == along_columns(runs[1], SQUARE))
        d_scores = jnp.where(j < i, d_lower, d_upper)
        if per_channel:
            d_scores = jnp.where(seen, d_scores, 0)
        else:
            as_query = [along(tiles.load(row_tile.at[3], layout), SQUARE) for along, layout in both_ways()]
            as_key = [along(tiles.load(row_tile.at[4], layout), SQUARE) for along, layout in both_ways()]
            exponent = jnp.where(j < i, as_query[0] - as_key[1], as_query[1] - as_key[0])
            d_scores = d_scores * jnp.exp(jnp.where(seen, exponent, -jnp.inf))
        d_scores = d_scores * scale
        d_diagonal = jnp.sum(jnp.where(i == j, d_lower, 0), axis=1) * scale
        if per_channel:
            d_scores = d_scores.astype(q.dtype)
        # Behind this line d_lower and d_upper are gone: registers for the rest.
        d_scores, d_diagonal, d_query, d_key = lax.optimization_barrier(
            (d_scores, d_diagonal, d_query, d_key)
        )

        def diagonal(d_x, other):
            """d_x plus the gradient of the token's own score, which no decay touches."""
            own = along_rows(d_diagonal, SQUARE) * tiles.load(other)
            if exclusive:
                own = own * along_columns(tiles.load(more["bonus_tile"], COLS), SQUARE)
            return d_x + own

        if not per_channel:
            as_keys = jnp.where(j < i, d_scores, 0).astype(q.dtype)
            as_queries = jnp.where(i < j, d_scores, 0).astype(q.dtype)
            d_query_in, d_key_in = (
                tiles.multiply(SQUARE, (as_keys, k_tile)),
                tiles.multiply(SQUARE, (as_queries, q_tile)),
            )
            d_query = d_query * along_rows(weigh_query, SQUARE)
            d_key = d_key * along_rows(weigh_key, SQUARE)
            sums_tile.at[0][...] = jnp.sum(tiles.load(q_tile) * (d_query + d_query_in), axis=1)
            sums_tile.at[1][...] = -jnp.sum(tiles.load(k_tile) * d_key_in, axis=1)
            sums_tile.at[2][...] = jnp.sum(tiles.load(k_tile) * d_key, axis=1)
            sums_tile.at[3][...] = passing * keep
            d_query, d_key = d_query + d_query_in, d_key + d_key_in
        else:
            parts, scaled = more["parts"], more["scaled"]
            tiles.number(more["tokens"])
            sums_tile.at[0][...] = passing
            tiles.split(tiles.load(more["decay"]), parts)
            plgpu.commit_smem()
            everything = tiles.decays(i >= 0, parts) * along_rows(keep, SQUARE)
            d_decay = everything * along_columns(tiles.load(sums_tile.at[0], COLS), SQUARE)

            def differentiate(d_decay, d_exponent, chosen_transposed):
                scaled[...] = d_exponent.astype(q.dtype)
                plgpu.commit_smem()
                return tiles.add_products(d_decay, (chosen_transposed.astype(q.dtype), scaled))

            factor = tiles.decays(up_to(i, j, exclusive), parts) * along_rows(weigh_query, SQUARE)
            d_query = d_query * factor
            d_decay = differentiate(d_decay, tiles.load(q_tile) * d_query, up_to(j, i, exclusive))
            factor = tiles.decays(after(i, j), parts)
            d_key = d_key * factor * along_rows(weigh_key, SQUARE)
            d_decay = differentiate(d_decay, tiles.load(k_tile) * d_key, after(j, i))

            def at_level(level, sums):
                d_query, d_key, d_decay = sums
                token = tiles.cast(more["tokens"][...], ROWS)
                query = along_rows(is_query(token, level), SQUARE)
                factor = tiles.decays(towards_border(token, level, exclusive).holds(j), parts)
                x = jnp.where(query, tiles.load(q_tile), tiles.load(k_tile)) * factor
                scaled[...] = x.astype(q.dtype)
                plgpu.commit_smem()
                d_pairs = jnp.where(opposite(token, level).holds(j), d_scores, jnp.zeros_like(d_scores))
                d_x = tiles.multiply(SQUARE, (d_pairs, scaled))
                d_exponent = d_x * tiles.load(scaled)
                d_x = d_x * factor
                d_query, d_key = d_query + jnp.where(query, d_x, 0), d_key + jnp.where(query, 0, d_x)
                d_query, d_key, d_exponent = lax.optimization_barrier((d_query, d_key, d_exponent))
                token = tiles.cast(more["tokens"][...], COLS)
                chosen = towards_border(token, level, exclusive).holds(i, along_columns)
                return d_query, d_key, differentiate(d_decay, d_exponent, chosen)

            d_query, d_key, d_decay = lax.fori_loop(0, LEVELS, at_level, (d_query, d_key, d_decay))
            more["decay"][...] = d_decay.astype(log_decay.dtype)

        d_query, d_key = diagonal(d_query, k_tile), diagonal(d_key, q_tile)
        d_q_tile[...] = d_query.astype(d_types[0])
        d_k_tile[...] = d_key.astype(d_types[1])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_q_tile, d_q_ref.at[b, when, h, keys])
        plgpu.copy_smem_to_gmem(d_k_tile, d_k_ref.at[b, when, h, keys])
        if per_channel:
            plgpu.copy_smem_to_gmem(more["decay"], d_decay_ref.at[b, when, h, keys])
        else:
            plgpu.copy_smem_to_gmem(sums_tile, d_decay_ref.at[b, h, chunk, key_block])
        plgpu.wait_smem_to_gmem(0)

    if per_channel:
        d_decay_type = jax.ShapeDtypeStruct((B, T, H, K), log_decay.dtype)
    else:
        d_decay_type = jax.ShapeDtypeStruct((B, H, T // CHUNK, K // 64, 4, CHUNK), F32)
    return plgpu.kernel(
        body,
        out_type=(*(jax.ShapeDtypeStruct((B, T, H, K), dtype) for dtype in d_types), d_decay_type),
        scratch_types=scratch,
        grid=(B, H, T // CHUNK * (K // 64)),
        grid_names=("b", "h", "block"),
        **launch("linear_attention_gradients", interpret=interpret, approx_math=True),
    )(*operands)


def both_ways():
    """A vector over tokens as the rows of a tile, and as its columns."""
    return (along_rows, ROWS), (along_columns, COLS)
