"""Backward TPU kernel: blocks in reverse, the gradient of the state carried, the states inside a block recomputed."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from .pallas_tpu_decay import (
    SUBLANES,
    HeadDecay,
    across,
    dot,
    head_decays,
    iota,
    log_decay_gradient,
    parted,
    split,
)
from .pallas_tpu_forward import (
    Plan,
    _aligned,
    channel_scores,
    chunk_levels,
    chunk_rows,
    level_operands,
    own_scores,
    recomputed_state,
    set_diagonal,
)


def diagonal(x: Array) -> Array:
    """[C, C] -> [C, 1]."""
    return jnp.sum(jnp.where(iota(x.shape, 0) == iota(x.shape, 1), x, 0.0), axis=1, keepdims=True)


def head_gradients(q, k, v, d_out, state, d_state, decay: HeadDecay, bonus, scale: float):
    """A chunk of one head with one decay.

    Args:
      state, d_state: [V, K], the state before the chunk, and the gradient of the state after it.

    Returns:
      dict of dq, dk [C, K], dv [C, V] in float32, d_bonus [1, K], the gradient of the state before, and what
      depends on the decays: reads [C, 1] and writes [C, 1] (of the weights of i and j with the states), pairs
      [C, C], carry [1, 1].
    """
    dtype = q.dtype
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = dot(q, k, "nt") * decay.pairs * scale
    d_scores = dot(d_out, v, "nt")
    pairs = scores * d_scores
    inner = (d_scores * decay.pairs * scale).astype(dtype)
    dq_state = dot(d_out, state.astype(dtype), "nn") * across(decay.read, q.shape[1]) * scale
    dk_state = dot(v, d_state.astype(dtype), "nn") * decay.write
    dq = dot(inner, k, "nn") + dq_state
    dk = dot(inner, q, "tn") + dk_state
    d_bonus = None
    if bonus is not None:
        own = diagonal(d_scores) * scale
        dq, dk, d_bonus = own_gradients(dq, dk, q32, k32, own, bonus)
        scores = set_diagonal(scores, own_scores(q32, k32, bonus) * scale)
    dv = dot(scores.astype(dtype), d_out, "tn") + dot(k, d_state.astype(dtype), "nt") * decay.write
    q_read = (q32 * (across(decay.read, q.shape[1]) * scale)).astype(dtype)
    # A token's weight in its own output depends on no decay; with a bonus, nor does its weight in the next one's.
    row, column = iota(pairs.shape, 0), iota(pairs.shape, 1)
    return dict(
        dq=dq,
        dk=dk,
        dv=dv,
        d_bonus=d_bonus,
        d_state=d_state * decay.last + dot(d_out, q_read, "tn"),
        reads=jnp.sum(q32 * dq_state, axis=1, keepdims=True),
        writes=jnp.sum(k32 * dk_state, axis=1, keepdims=True),
        pairs=jnp.where(row > column + (0 if bonus is None else 1), pairs, 0.0),
        carry=jnp.sum(state * d_state, keepdims=True) * decay.last,
    )


def own_gradients(dq, dk, q32, k32, own, bonus):
    """Add what a token's own weight, with gradient `own` [C, 1], gives to dq and dk; and d_bonus [1, K]."""
    d_bonus = jnp.sum(own * q32 * k32, axis=0, keepdims=True)
    return dq + own * bonus * k32, dk + own * bonus * q32, d_bonus


def rows_gradient(heads: list[dict], *, bonus: bool) -> Array:
    """d log_decay [8, C] of a chunk's heads.

    The decay of token t weighs every pair j < t <= i (with a bonus, j < t < i), the incoming state as any such i
    reads it, any such j in the outgoing state, and the one in the other.
    """
    C = heads[0]["pairs"].shape[0]
    s, t = iota((C, C), 0), iota((C, C), 1)
    later = jnp.where(s > t if bonus else s >= t, 1.0, 0.0)
    lane, sublane = iota((C, SUBLANES), 1), iota((SUBLANES, C), 0)
    readers = writers = jnp.zeros((C, SUBLANES), jnp.float32)
    columns = carries = jnp.zeros((SUBLANES, C), jnp.float32)
    for n, head in enumerate(heads):
        read = head["reads"] + jnp.sum(head["pairs"], axis=1, keepdims=True)
        readers = jnp.where(lane == n, read, readers)
        writers = jnp.where(lane == n, head["writes"], writers)
        columns = jnp.where(sublane == n, jnp.sum(head["pairs"], axis=0, keepdims=True), columns)
        carries = jnp.where(sublane == n, head["carry"], carries)
    grad = carries + dot(readers.T, later, "nn") + dot(writers.T, jnp.where(s < t, 1.0, 0.0), "nn")
    return grad - dot(columns, jnp.where(s >= t, 1.0, 0.0), "nn")


def channel_gradients(q, k, v, d_out, state, d_state, tree, bonus, scale: float):
    """A chunk of one head with a decay a channel: the same as `head_gradients`, and d log_decay [C, K]."""
    found, whole, total = tree
    dtype = q.dtype
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = channel_scores(found, q32, k32, dtype, bonus) * scale
    d_scores = dot(d_out, v, "nt") * scale
    d_scores_t = dot(v, d_out, "nt") * scale
    dq_state = dot(d_out, state.astype(dtype), "nn") * whole.read * scale
    dk_state = dot(v, d_state.astype(dtype), "nn") * whole.write
    own = diagonal(d_scores)
    one = jnp.ones((1, q.shape[1]), jnp.float32) if bonus is None else bonus
    dq, dk, d_bonus = own_gradients(dq_state, dk_state, q32, k32, own, one)
    of_levels = []
    for level in found:
        _, q_level, k_level = level_operands(level, q32, k32, dtype)
        dq_level = from_pairs(d_scores, k_level, level.half, "right") * level.read
        dk_level = from_pairs(d_scores_t, q_level, level.half, "left") * level.write
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
    """[C, K]: a level's share of the product of d_scores with an operand; zero in rows of the other halves."""
    C = operand.shape[0]
    if half < SUBLANES:
        mask = parted(half, C, "all")
        if rows == "left":
            row, column = iota((C, C), 0), iota((C, C), 1)
            mask = (((row ^ column) >> (half.bit_length() - 1)) == 1) & (row < column)
        return dot(jnp.where(mask, d_scores, 0.0).astype(operand.dtype), operand, "nn")
    stacked = jnp.concatenate(split(d_scores, half)[1 if rows == "right" else 0], axis=0)
    stacked = jnp.where(parted(half, C, rows), stacked, 0.0).astype(operand.dtype)
    product = dot(stacked, operand, "nn")
    blocks = [product[n : n + half] for n in range(0, C // 2, half)]
    zeros = jnp.zeros_like(blocks[0])
    ordered = [(zeros, x) if rows == "right" else (x, zeros) for x in blocks]
    return jnp.concatenate([x for pair in ordered for x in pair], axis=0)


def backward_kernel(plan: Plan, refs: dict) -> None:
    """refs: q, k, v, (log_decay), (rows), (bonus), d_out, d_final_state, states -> dq, dk, dv, (d_log_decay),
    (d_rows), (d_bonus), d_initial_state; scratch: d_state [heads, V, K], chunk_states [chunks, heads, V, K]."""
    tiling, cuts = plan.tiling, plan.cuts
    reversed_t = pl.program_id(2)
    blocks = pl.num_programs(2)
    first = (blocks - 1 - reversed_t) * tiling.block
    chunks = tiling.block // tiling.chunk
    together = 2 if tiling.heads % 2 == 0 else 1
    has_bonus = "bonus" in refs

    @pl.when(reversed_t == 0)
    def _():
        for n in range(tiling.heads):
            refs["d_state"][n] = refs["d_final_state"][0, n].T
        if has_bonus:
            refs["d_bonus"][...] = jnp.zeros_like(refs["d_bonus"])

    for n in range(tiling.heads):
        refs["chunk_states"][0, n] = refs["states"][0, n, 0]

    def recompute(index, _):
        start = _aligned(index, tiling)
        for n in range(tiling.heads):
            state = recomputed_state(plan, refs, n, start, first, refs["chunk_states"][index, n])
            refs["chunk_states"][index + 1, n] = state
        return 0

    jax.lax.fori_loop(0, chunks - 1, recompute, 0)

    def chunk(reversed_index, _):
        index = chunks - 1 - reversed_index
        start = _aligned(index, tiling)
        if not plan.channels:
            rows = chunk_rows(plan, refs, start)
            decays = head_decays(rows, tiling.chunk, tiling.heads, bonus=has_bonus, exact=cuts["q"].dtype == jnp.float32)
        found = []
        for group in range(0, tiling.heads, together):
            for n in range(group, group + together):
                q, k, v = (cuts[x].load(refs[x], n, start, first) for x in ("q", "k", "v"))
                d_out = cuts["out"].load(refs["d_out"], n, start, first)
                states = refs["chunk_states"][index, n], refs["d_state"][n]
                bonus = refs["bonus"][0, n : n + 1] if has_bonus else None
                if plan.channels:
                    tree = chunk_levels(plan, refs, n, start, first, has_bonus)
                    grads = channel_gradients(q, k, v, d_out, *states, tree, bonus, plan.scale)
                else:
                    grads = head_gradients(q, k, v, d_out, *states, decays[n], bonus, plan.scale)
                refs["d_state"][n] = grads["d_state"]
                if has_bonus:
                    refs["d_bonus"][0, 0, n : n + 1] += grads["d_bonus"]
                found.append(grads)
            for name in ("dq", "dk", "dv", *(("d_log_decay",) if plan.channels else ())):
                cuts[name].store(refs[name], group, start, [x[name] for x in found[group:]])
        if "d_rows" in refs:
            refs["d_rows"][0, 0, :, pl.ds(start, tiling.chunk)] = rows_gradient(found, bonus=has_bonus)
        return 0

    jax.lax.fori_loop(0, chunks, chunk, 0)

    @pl.when(reversed_t == blocks - 1)
    def _():
        for n in range(tiling.heads):
            refs["d_initial_state"][0, n] = refs["d_state"][n].T
