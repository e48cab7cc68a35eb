"""Forward TPU kernels: a grid over (batch, head groups, time), the state carried in VMEM from block to block."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from .pallas_tpu_blocks import Cut
from .pallas_tpu_decay import SUBLANES, HeadDecay, Level, across, dot, head_decays, iota, join, levels, parted, split
from .tiling import Tiling


@dataclass(frozen=True)
class Plan:
    """What a kernel must know of a call, all of it static."""

    tiling: Tiling
    cuts: dict[str, Cut]  # of "q", "k", "v", "out" and, a decay a channel, "log_decay"
    scale: float

    @property
    def channels(self) -> bool:
        return "log_decay" in self.cuts


def chunk_levels(plan: Plan, refs: dict, n: int, start, first, bonus: bool):
    """`levels` of head n's chunk that begins `start` tokens into the block."""
    log_decay = plan.cuts["log_decay"].load(refs["log_decay"], n, start, first).astype(jnp.float32)
    decay, keep = jnp.exp(log_decay), None
    if "rows" in refs:  # zero where a document starts
        keep = refs["rows"][0, 0, :, pl.ds(start, plan.tiling.chunk)].T[:, :1]
        decay = decay * keep
    return levels(decay, keep, bonus=bonus)


def chunk_rows(plan: Plan, refs: dict, start) -> Array | None:
    """Log decays [8, C] of the heads of a chunk, where there is one a head."""
    return refs["rows"][0, 0, :, pl.ds(start, plan.tiling.chunk)] if "rows" in refs else None


def level_operands(level: Level, q: Array, k: Array, dtype) -> tuple[Array, Array, Array]:
    """Decayed queries of right halves, decayed keys of left halves (other rows: kept whole, to be masked out).

    Halves that fill registers are stacked: half as many queries [C/2, K] then go through the matrix unit.
    """
    half = level.half
    if half < SUBLANES:
        q_level, k_level = q * level.read, k * level.write
        return q_level.astype(dtype), q_level.astype(dtype), k_level.astype(dtype)
    (q_left, q_right), (k_left, k_right) = split(q, half), split(k, half)
    q_right = [a * b for a, b in zip(q_right, split(level.read, half)[1], strict=True)]
    k_left = [a * b for a, b in zip(k_left, split(level.write, half)[0], strict=True)]
    stacked = jnp.concatenate(q_right, axis=0).astype(dtype)
    return stacked, join(q_left, q_right).astype(dtype), join(k_left, k_right).astype(dtype)


def place(scores: Array, stacked: Array, half: int, C: int, rows: str) -> Array:
    """Put a level's pairs into the chunk's scores [C, C]."""
    mask = parted(half, C, "all" if half < SUBLANES else rows)
    if half < SUBLANES:
        return jnp.where(mask, stacked, scores)
    lefts, rights = split(scores, half)
    old = rights if rows == "right" else lefts
    new = [
        jnp.where(mask[n * half : (n + 1) * half], stacked[n * half : (n + 1) * half], x)
        for n, x in enumerate(old)
    ]
    return join(lefts, new) if rows == "right" else join(new, rights)


def own_scores(q: Array, k: Array, bonus: Array | None) -> Array:
    """[C, 1]: the weight of each token in its own output."""
    return jnp.sum(q * k if bonus is None else q * bonus * k, axis=1, keepdims=True)


def set_diagonal(scores: Array, own: Array) -> Array:
    return jnp.where(iota(scores.shape, 0) == iota(scores.shape, 1), own, scores)


def channel_scores(found: list[Level], q: Array, k: Array, dtype, bonus: Array | None) -> Array:
    """[C, C] scores of a chunk whose channels decay each at their own pace; q and k in float32."""
    C = q.shape[0]
    scores = jnp.zeros((C, C), jnp.float32)
    for level in found:
        q_level, _, k_level = level_operands(level, q, k, dtype)
        scores = place(scores, dot(q_level, k_level, "nt"), level.half, C, "right")
    return set_diagonal(scores, own_scores(q, k, bonus))


def next_state(state: Array, k: Array, v: Array, write, last) -> Array:
    """The state [V, K] after a chunk; `write` weighs tokens, `last` the state before."""
    k_written = (k.astype(jnp.float32) * write).astype(k.dtype)
    return state * last + dot(v, k_written, "tn")


def next_head_state(state: Array, k: Array, v: Array, decay: HeadDecay) -> Array:
    """The state [V, K] after a chunk of a head with one decay."""
    v_written = (v.T.astype(jnp.float32) * decay.write_row).astype(v.dtype)
    return state * decay.last + dot(v_written, k, "nn")


def head_step(q: Array, k: Array, v: Array, state: Array, decay: HeadDecay, bonus, scale: float):
    """A chunk of one head with one decay: (out [C, V] in float32, the state after it)."""
    scores = dot(q, k, "nt") * decay.pairs
    if bonus is not None:
        scores = set_diagonal(scores, own_scores(q.astype(jnp.float32), k.astype(jnp.float32), bonus))
    out = dot(scores.astype(v.dtype), v, "nn")
    out = out + across(decay.read, v.shape[1]) * dot(q, state.astype(q.dtype), "nt")
    return out * scale, next_head_state(state, k, v, decay)


def channel_step(q: Array, k: Array, v: Array, state: Array, tree, bonus, scale: float):
    """The same with a decay a channel."""
    found, whole, total = tree
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    scores = channel_scores(found, q32, k32, q.dtype, bonus)
    out = dot(scores.astype(v.dtype), v, "nn")
    out = out + dot((q32 * whole.read).astype(q.dtype), state.astype(q.dtype), "nt")
    return out * scale, next_state(state, k, v, whole.write, total)


def load_initial(refs: dict, heads: int) -> None:
    """At the first block: state[n] [V, K] from initial_state [K, V], or zeros."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        for n in range(heads):
            state = refs["state"].at[n]
            state[...] = refs["initial_state"][0, n].T if "initial_state" in refs else jnp.zeros_like(state)


def forward_kernel(plan: Plan, refs: dict) -> None:
    """refs: q, k, v, (log_decay), (rows), (bonus), (initial_state) -> out, final_state; scratch: state."""
    tiling, cuts = plan.tiling, plan.cuts
    t = pl.program_id(2)
    first = t * tiling.block
    load_initial(refs, tiling.heads)
    together = 2 if tiling.heads % 2 == 0 else 1  # heads that share words when they are written

    def chunk(index, _):
        start = _aligned(index, tiling)
        if not plan.channels:
            rows = chunk_rows(plan, refs, start)
            decays = head_decays(rows, tiling.chunk, tiling.heads, bonus="bonus" in refs, exact=cuts["q"].dtype == jnp.float32)
        for group in range(0, tiling.heads, together):
            outs = []
            for n in range(group, group + together):
                q, k, v = (cuts[x].load(refs[x], n, start, first) for x in ("q", "k", "v"))
                bonus = refs["bonus"][0, n : n + 1] if "bonus" in refs else None
                state = refs["state"][n]
                if plan.channels:
                    tree = chunk_levels(plan, refs, n, start, first, bonus is not None)
                    out, state = channel_step(q, k, v, state, tree, bonus, plan.scale)
                else:
                    out, state = head_step(q, k, v, state, decays[n], bonus, plan.scale)
                refs["state"][n] = state
                outs.append(out)
            cuts["out"].store(refs["out"], group, start, outs)
        return 0

    jax.lax.fori_loop(0, tiling.block // tiling.chunk, chunk, 0)

    @pl.when(t == pl.num_programs(2) - 1)
    def _():
        for n in range(tiling.heads):
            refs["final_state"][0, n] = refs["state"][n].T


def states_kernel(plan: Plan, refs: dict) -> None:
    """refs: k, v, (log_decay), (rows), (initial_state) -> states [V, K] before each block; scratch: state."""
    tiling = plan.tiling
    first = pl.program_id(2) * tiling.block
    load_initial(refs, tiling.heads)
    for n in range(tiling.heads):
        refs["states"][0, n, 0] = refs["state"][n]

    def chunk(index, _):
        start = _aligned(index, tiling)
        for n in range(tiling.heads):
            refs["state"][n] = recomputed_state(plan, refs, n, start, first, refs["state"][n])
        return 0

    jax.lax.fori_loop(0, tiling.block // tiling.chunk, chunk, 0)


def recomputed_state(plan: Plan, refs: dict, n: int, start, first, state: Array) -> Array:
    """The state after head n's chunk, from the one before it."""
    k, v = (plan.cuts[x].load(refs[x], n, start, first) for x in ("k", "v"))
    if plan.channels:
        _, whole, total = chunk_levels(plan, refs, n, start, first, bonus=False)
        return next_state(state, k, v, whole.write, total)
    rows = chunk_rows(plan, refs, start)
    decay = head_decays(rows, plan.tiling.chunk, plan.tiling.heads, bonus=False, exact=k.dtype == jnp.float32)[n]
    return next_head_state(state, k, v, decay)


def _aligned(index, tiling: Tiling):
    return pl.multiple_of(index * tiling.chunk, tiling.chunk)
