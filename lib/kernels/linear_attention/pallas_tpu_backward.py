"""Backward TPU kernel: blocks in reverse, the state's gradient carried, states inside a block recomputed."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..common.chips import LANES, SUBLANES
from ..common.tpu import dot, iota
from . import pallas_tpu_features as features
from .pallas_tpu_decay import HeadDecay, across, join, log_decay_gradient, masked_sums, ranks, split
from .pallas_tpu_forward import (
    Spec,
    _aligned,
    channel_scores,
    chunk_decay,
    chunk_levels,
    level_keys,
    level_queries,
    own_scores,
    prepare_block,
    recomputed_state,
    set_diagonal,
    staggered,
)


def diagonal(x: Array) -> Array:
    """[C, C] -> [C, 1]."""
    return jnp.sum(jnp.where(iota(x.shape, 0) == iota(x.shape, 1), x, 0.0), axis=1, keepdims=True)


def head_gradients(q, k, v, d_out, state, d_state, decay: HeadDecay, bonus, scale: float):
    """A chunk of one head with one decay; a generator, for `staggered`.

    Args:
      state, d_state: [V, K], the state before the chunk, and the gradient of the state after it.

    Returns:
      dict of dq, dk [C, K], dv [C, V] in float32, d_bonus [1, K], the gradient of the state before, and what
      depends on the decays: reads [C, 1] (of token i's weights with the state and earlier tokens), writes
      [C, 1] (of j's with the next state), columns [1, C] (of j's with later tokens), carry [1, 1].
    """
    dtype = q.dtype
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    read = across(decay.read, q.shape[1])
    weights = decay.pairs * scale
    scores = dot(q, k, "nt") * weights
    d_scores = dot(d_out, v, "nt")
    inner = (d_scores * weights).astype(dtype)
    # A token's weight in its own output depends on no decay; with a bonus, nor does its weight in the next
    # one's.
    row, column = iota(scores.shape, 0), iota(scores.shape, 1)
    pairs = jnp.where(row > column + (0 if bonus is None else 1), scores * d_scores, 0.0)
    own = None
    if bonus is not None:
        own = diagonal(d_scores) * scale
        scores = set_diagonal(scores, own_scores(q32, k32, bonus) * scale)
    scores = scores.astype(dtype)
    yield
    dq_state = dot(d_out, state.astype(dtype), "nn") * (read * scale)
    dk_state = dot(v, d_state.astype(dtype), "nn") * decay.write
    dv = dot(scores, d_out, "tn") + dot(k, d_state.astype(dtype), "nt") * decay.write
    dq = dot(inner, k, "nn") + dq_state
    dk = dot(inner, q, "tn") + dk_state
    d_bonus = None
    if bonus is not None:
        dq, dk, d_bonus = own_gradients(dq, dk, q32, k32, own, bonus)
    q_read = (q32 * (read * scale)).astype(dtype)
    return dict(
        dq=dq,
        dk=dk,
        dv=dv,
        d_bonus=d_bonus,
        d_state=d_state * decay.last + dot(d_out, q_read, "tn"),
        reads=lane_sums(q32 * dq_state, pairs),
        writes=lane_sums(k32 * dk_state),
        columns=jnp.sum(pairs, axis=0, keepdims=True),
        carry=jnp.sum(state * d_state, keepdims=True) * decay.last,
    )


def lane_sums(*terms: Array) -> Array:
    """[C, 1]: the sum of all columns of all terms; registers are added up first, for lanes add up slowly."""
    tiles = [x[:, n : n + LANES] for x in terms for n in range(0, x.shape[1], LANES)]
    wide = [x for x in tiles if x.shape[1] == LANES]
    narrow = [jnp.sum(x, axis=1, keepdims=True) for x in tiles if x.shape[1] < LANES]
    return sum(narrow, jnp.sum(sum(wide[1:], wide[0]), axis=1, keepdims=True))


def own_gradients(dq, dk, q32, k32, own, bonus):
    """Add what a token's own weight, with gradient `own` [C, 1], gives to dq and dk; and d_bonus [1, K]."""
    d_bonus = jnp.sum(own * q32 * k32, axis=0, keepdims=True)
    return dq + own * bonus * k32, dk + own * bonus * q32, d_bonus


def rows_gradient(heads: list[dict], *, bonus: bool) -> Array:
    """d log_decay [8, C] of a chunk's heads.

    The decay of token t weighs every pair j < t <= i (with a bonus, j < t < i), the incoming state as such an
    i reads it, such a j in the outgoing state, and the one state in the other.
    """
    C = heads[0]["columns"].shape[1]
    s, t = iota((C, C), 0), iota((C, C), 1)
    lane, sublane = iota((C, 2 * SUBLANES), 1), iota((SUBLANES, C), 0)
    reads_writes = jnp.zeros((C, 2 * SUBLANES), jnp.float32)
    columns = carries = jnp.zeros((SUBLANES, C), jnp.float32)
    for n, head in enumerate(heads):
        reads_writes = jnp.where(lane == n, head["reads"], reads_writes)
        reads_writes = jnp.where(lane == n + SUBLANES, head["writes"], reads_writes)
        columns = jnp.where(sublane == n, head["columns"], columns)
        carries = jnp.where(sublane == n, head["carry"], carries)
    reads_writes = reads_writes.T
    reads = masked_sums(reads_writes[:SUBLANES], s > t if bonus else s >= t)
    writes = masked_sums(reads_writes[SUBLANES:], s < t)
    return carries + reads + writes - masked_sums(columns, s >= t)


def channel_gradients(q, k, v, d_out, state, d_state, tree, bonus, scale: float):
    """A chunk of one head with a decay a channel: the same as of `head_gradients`, and d log_decay [C, K]."""
    found, whole, total = tree
    dtype = q.dtype
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = channel_scores(found, q32, k32, dtype, bonus) * scale
    d_scores = dot(d_out, v, "nt") * scale
    d_scores_t = dot(v, d_out, "nt") * scale
    dq_state = dot(d_out, state.astype(dtype), "nn") * whole.read * scale
    dk_state = dot(v, d_state.astype(dtype), "nn") * whole.write
    own = diagonal(d_scores)
    yield
    one = jnp.ones((1, q.shape[1]), jnp.float32) if bonus is None else bonus
    dq, dk, d_bonus = own_gradients(dq_state, dk_state, q32, k32, own, one)
    of_levels = []
    for level in found:
        q_level = level_queries(level, q32, dtype)
        if level.half >= SUBLANES:
            q_level = [join(split(q32, level.half)[0], q_level).astype(dtype)]
        dq_level = from_pairs(d_scores, level_keys(level, k32, dtype), level.half, "right") * level.read
        dk_level = from_pairs(d_scores_t, q_level[0], level.half, "left") * level.write
        dq, dk = dq + dq_level, dk + dk_level
        of_levels.append((q32 * dq_level, k32 * dk_level))
    carry = jnp.sum(state * d_state, axis=0, keepdims=True) * total
    edges = (q32 * dq_state, k32 * dk_state, carry)
    q_read = (q32 * whole.read * scale).astype(dtype)
    return dict(
        dq=dq,
        dk=dk,
        dv=dot(scores.astype(dtype), d_out, "tn")
        + dot((k32 * whole.write).astype(dtype), d_state.astype(dtype), "nt"),
        d_bonus=d_bonus,
        d_state=d_state * total + dot(d_out, q_read, "tn"),
        d_log_decay=log_decay_gradient(found, of_levels, edges, bonus=bonus is not None),
    )


def from_pairs(d_scores: Array, operand: Array, half: int, rows: str) -> Array:
    """[C, K]: a level's share of d_scores times an operand; zero in the other halves' rows."""
    C = operand.shape[0]
    rank = ranks(C, transposed=rows == "left")
    if half < SUBLANES:
        mine = (rank >= half) & (rank < 2 * half)
        return dot(jnp.where(mine, d_scores, 0.0).astype(operand.dtype), operand, "nn")
    side = 1 if rows == "right" else 0
    blocks = zip(split(d_scores, half)[side], split(rank, half)[side], strict=True)
    blocks = [jnp.where((r >= half) & (r < 2 * half), x, 0.0) for x, r in blocks]
    product = dot(jnp.concatenate(blocks, axis=0).astype(operand.dtype), operand, "nn")
    blocks = [product[n : n + half] for n in range(0, C // 2, half)]
    zeros = [jnp.zeros_like(x) for x in blocks]
    return join(zeros, blocks) if rows == "right" else join(blocks, zeros)


def backward_kernel(spec: Spec, refs: dict) -> None:
    """One grid step.

    refs: (left, right, terms), q, k, v, (log_decay), (rows), (bonus), d_out, d_final_state, states -> dq, dk,
    dv, (d_log_decay), (d_rows), (d_bonus), d_initial_state; scratch: d_state [heads, V, K], chunk_states
    [chunks, heads, V, K].
    """
    tiling, layouts = spec.tiling, spec.layouts
    first = spec.grid.first_token()
    chunks = tiling.block // tiling.chunk
    has_bonus = "bonus" in refs

    @spec.grid.at_start()
    def _():
        for n in range(tiling.heads):
            refs["d_state"][n] = refs["d_final_state"][0, n].T
        if has_bonus:
            refs["d_bonus"][...] = jnp.zeros_like(refs["d_bonus"])

    for n in range(tiling.heads):
        refs["chunk_states"][0, n] = refs["states"][0, n, 0]

    prepare_block(spec, refs, bonus=has_bonus)

    def recompute(index, _):
        for n in range(tiling.heads):
            state = recomputed_state(spec, refs, n, index, first, refs["chunk_states"][index, n])
            refs["chunk_states"][index + 1, n] = state
        return 0

    jax.lax.fori_loop(0, chunks - 1, recompute, 0)

    def chunk(reversed_index, _):
        index = chunks - 1 - reversed_index
        start = _aligned(index, tiling)

        def head(n):
            q, k, v = (spec.load(refs, x, n, start, first) for x in ("q", "k", "v"))
            d_out = layouts["out"].load(refs["d_out"], n, start, first)
            states = refs["chunk_states"][index, n], refs["d_state"][n]
            bonus = refs["bonus"][0, n : n + 1] if has_bonus else None
            if spec.channels:
                tree = chunk_levels(spec, refs, n, start, first, has_bonus)
                grads = yield from channel_gradients(q, k, v, d_out, *states, tree, bonus, spec.scale)
            else:
                decay = chunk_decay(spec, refs, n, index, bonus=has_bonus)
                grads = yield from head_gradients(q, k, v, d_out, *states, decay, bonus, spec.scale)
            refs["d_state"][n] = grads["d_state"]
            if spec.narrow:
                for x in features.NARROW:
                    narrow = layouts[x].load(refs[x], n, start, first)
                    grads[f"d{x}"] = features.contract(refs, narrow, grads[f"d{x}"])
            if has_bonus:
                refs["d_bonus"][0, 0, n : n + 1] += grads["d_bonus"]
            return grads

        found = staggered([head(n) for n in range(tiling.heads)], tiling.heads)
        for name in ("dq", "dk", "dv", *(("d_log_decay",) if spec.channels else ())):
            layouts[name].store(refs[name], 0, start, [x[name] for x in found])
        if "d_rows" in refs:
            refs["d_rows"][0, 0, :, pl.ds(start, tiling.chunk)] = rows_gradient(found, bonus=has_bonus)
        return 0

    jax.lax.fori_loop(0, chunks, chunk, 0)

    @spec.grid.at_end()
    def _():
        for n in range(tiling.heads):
            refs["d_initial_state"][0, n] = refs["d_state"][n].T
