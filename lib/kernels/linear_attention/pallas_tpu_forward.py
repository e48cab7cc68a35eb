"""Forward TPU kernels: a grid over (batch, head groups, time), the state carried in VMEM between blocks."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..common.chips import SUBLANES
from ..common.tpu import Layout, TimeGrid, dot, iota
from . import pallas_tpu_features as features
from .pallas_tpu_decay import HeadDecay, Level, across, head_decay, join, levels, prepare_decays, ranks, split
from .tiling import Tiling

Out = TypeVar("Out")


@dataclass(frozen=True)
class Spec:
    """A kernel's static description of a call."""

    tiling: Tiling
    grid: TimeGrid
    layouts: dict[str, Layout]  # of "q", "k", "v", "out" and, a decay a channel, "log_decay"
    scale: float

    @property
    def channels(self) -> bool:
        return "log_decay" in self.layouts

    def load(self, refs: dict, name: str, n: int, start, first) -> Array:
        """Tokens [chunk, width] of head n of q, k or v: features, where the kernel makes them."""
        x = self.layouts[name].load(refs[name], n, start, first)
        return features.expand(refs, x) if self.narrow and name in features.NARROW else x

    @property
    def narrow(self) -> bool:
        """The kernel makes features of q and k itself."""
        return isinstance(self.layouts["k"], features.NarrowLayout)


def chunk_levels(spec: Spec, refs: dict, n: int, start, first, bonus: bool):
    """`levels` of head n's chunk that begins `start` tokens into the block."""
    log_decay = spec.layouts["log_decay"].load(refs["log_decay"], n, start, first).astype(jnp.float32)
    decay, keep = jnp.exp(log_decay), None
    if "rows" in refs:  # zero where a document starts
        keep = refs["rows"][0, 0, :, pl.ds(start, spec.tiling.chunk)].T[:, :1]
        decay = decay * keep
    return levels(decay, keep, bonus=bonus)


def prepare_block(spec: Spec, refs: dict, *, bonus: bool) -> None:
    """Fill decay_rows and decay_columns for each chunk of the block, where heads have one decay each."""
    if "decay_rows" not in refs:
        return
    C = spec.tiling.chunk
    for index in range(spec.tiling.block // C):
        rows = refs["rows"][0, 0, :, index * C : (index + 1) * C]
        refs["decay_rows"][index], refs["decay_columns"][index] = prepare_decays(
            rows, bonus=bonus, exact=spec.layouts["k"].dtype == jnp.float32
        )


def chunk_decay(spec: Spec, refs: dict, n: int, index, *, bonus: bool) -> HeadDecay:
    """Head n's decay in a chunk of the block, where there is one a head, or none."""
    prepared = None
    if "decay_rows" in refs:
        prepared = refs["decay_rows"][index], refs["decay_columns"][index]
    return head_decay(prepared, n, spec.tiling.chunk, bonus=bonus)


def level_queries(level: Level, q: Array, dtype) -> list[Array]:
    """Queries of the right halves with their decay, as blocks of `half` rows.

    One block of all rows where halves are smaller than a register.
    """
    if level.half < SUBLANES:
        return [(q * level.read).astype(dtype)]
    rights = zip(split(q, level.half)[1], split(level.read, level.half)[1], strict=True)
    return [a * b for a, b in rights]


def level_keys(level: Level, k: Array, dtype) -> Array:
    """Keys [C, K], those of left halves with their decay; what others hold is not looked at."""
    if level.half == 1:  # nothing lies between a token and the end of its half
        return k.astype(dtype)
    if level.half < SUBLANES:
        return (k * level.write).astype(dtype)
    lefts, rights = split(k, level.half)
    writes = split(level.write, level.half)[0]
    return join([a * b for a, b in zip(lefts, writes, strict=True)], rights).astype(dtype)


def own_scores(q: Array, k: Array, bonus: Array | None) -> Array:
    """[C, 1]: the weight of each token in its own output."""
    return jnp.sum(q * k if bonus is None else q * bonus * k, axis=1, keepdims=True)


def set_diagonal(scores: Array, own: Array) -> Array:
    return jnp.where(iota(scores.shape, 0) == iota(scores.shape, 1), own, scores)


def channel_scores(found: list[Level], q: Array, k: Array, dtype, bonus: Array | None) -> Array:
    """[C, C] scores of a chunk whose channels decay each at their own pace; q and k in float32."""
    C = q.shape[0]
    rank = ranks(C)
    scores = jnp.zeros((C, C), jnp.float32)
    for level in found:  # each level overwrites what it and later ones hold
        half = level.half
        queries = level_queries(level, q, dtype)
        product = dot(jnp.concatenate(queries, axis=0).astype(dtype), level_keys(level, k, dtype), "nt")
        if half < SUBLANES:
            scores = jnp.where(rank >= half, product, scores)
            continue
        lefts, rights = split(scores, half)
        blocks = zip(split(rank, half)[1], range(0, C // 2, half), rights, strict=True)
        scores = join(lefts, [jnp.where(r >= half, product[n : n + half], old) for r, n, old in blocks])
    return set_diagonal(scores, own_scores(q, k, bonus))


def next_state(state: Array, k: Array, v: Array, write, last) -> Array:
    """The state [V, K] after a chunk; `write` weighs tokens, `last` the state before."""
    k_written = (k.astype(jnp.float32) * write).astype(k.dtype)
    return state * last + dot(v, k_written, "tn")


def next_head_state(state: Array, k: Array, v: Array, decay: HeadDecay) -> Array:
    """The state [V, K] after a chunk of a head with one decay."""
    v_written = (v.T.astype(jnp.float32) * decay.write_row).astype(v.dtype)
    return state * decay.last + dot(v_written, k, "nn")


def head_scores(q: Array, k: Array, decay: HeadDecay, bonus: Array | None) -> Array:
    """[C, C] scores of a chunk of one head with one decay."""
    scores = dot(q, k, "nt") * decay.pairs
    if bonus is None:
        return scores
    return set_diagonal(scores, own_scores(q.astype(jnp.float32), k.astype(jnp.float32), bonus))


def head_step(scores, q: Array, k: Array, v: Array, state: Array, decay: HeadDecay) -> tuple[Array, Array]:
    """A chunk of one head with one decay: (out [C, V] in float32 and not yet scaled, the state after it)."""
    out = dot(scores, v, "nn")
    out = out + across(decay.read, v.shape[1]) * dot(q, state.astype(q.dtype), "nt")
    return out, next_head_state(state, k, v, decay)


def channel_step(scores, q: Array, k: Array, v: Array, state: Array, tree) -> tuple[Array, Array]:
    """The same with a decay a channel."""
    _, whole, total = tree
    q_read = (q.astype(jnp.float32) * whole.read).astype(q.dtype)
    out = dot(scores, v, "nn") + dot(q_read, state.astype(q.dtype), "nt")
    return out, next_state(state, k, v, whole.write, total)


def staggered(heads: list[Generator[None, None, Out]], lag: int) -> list[Out]:
    """Run generators in turn, each to its next yield: head n begins at step n and advances every `lag` steps.

    The compiler keeps much of the order it is given: so one head's latencies hide behind the others' work.
    """
    results: dict[int, Out] = {}
    step = 0
    while len(results) < len(heads):
        for n, head in enumerate(heads):
            if n not in results and step >= n and (step - n) % lag == 0:
                try:
                    next(head)
                except StopIteration as stop:
                    results[n] = stop.value
        step += 1
    return [results[n] for n in range(len(heads))]


def load_initial(spec: Spec, refs: dict) -> None:
    """At the first block: state[n] [V, K] from initial_state [K, V], or zeros."""

    @spec.grid.at_start()
    def _():
        for n in range(spec.tiling.heads):
            state = refs["state"].at[n]
            state[...] = refs["initial_state"][0, n].T if "initial_state" in refs else jnp.zeros_like(state)


def forward_kernel(spec: Spec, refs: dict) -> None:
    """One grid step.

    refs: (left, right, terms), q, k, v, (log_decay), (rows), (bonus), (initial_state) -> out, final_state;
    scratch: state.
    """
    tiling, layouts = spec.tiling, spec.layouts
    first = spec.grid.first_token()
    load_initial(spec, refs)
    prepare_block(spec, refs, bonus="bonus" in refs)

    def head(n, index, start):
        q, k, v = (spec.load(refs, x, n, start, first) for x in ("q", "k", "v"))
        bonus = refs["bonus"][0, n : n + 1] if "bonus" in refs else None
        if spec.channels:
            decay = chunk_levels(spec, refs, n, start, first, bonus is not None)
            scores = channel_scores(decay[0], q.astype(jnp.float32), k.astype(jnp.float32), q.dtype, bonus)
        else:
            decay = chunk_decay(spec, refs, n, index, bonus=bonus is not None)
            scores = head_scores(q, k, decay, bonus)
        scores = scores.astype(q.dtype)
        yield
        step = channel_step if spec.channels else head_step
        out, refs["state"][n] = step(scores, q, k, v, refs["state"][n], decay)
        return out * spec.scale

    def chunk(index, _):
        start = _aligned(index, tiling)
        outs = staggered([head(n, index, start) for n in range(tiling.heads)], tiling.heads)
        layouts["out"].store(refs["out"], 0, start, outs)
        return 0

    jax.lax.fori_loop(0, tiling.block // tiling.chunk, chunk, 0)

    @spec.grid.at_end()
    def _():
        for n in range(tiling.heads):
            refs["final_state"][0, n] = refs["state"][n].T


def states_kernel(spec: Spec, refs: dict) -> None:
    """One grid step.

    refs: (left, right, terms), k, v, (log_decay), (rows), (initial_state) -> states [V, K] before each block;
    scratch: state.
    """
    tiling = spec.tiling
    first = spec.grid.first_token()
    load_initial(spec, refs)
    prepare_block(spec, refs, bonus=False)
    for n in range(tiling.heads):
        refs["states"][0, n, 0] = refs["state"][n]

    def chunk(index, _):
        for n in range(tiling.heads):
            refs["state"][n] = recomputed_state(spec, refs, n, index, first, refs["state"][n])
        return 0

    jax.lax.fori_loop(0, tiling.block // tiling.chunk, chunk, 0)


def recomputed_state(spec: Spec, refs: dict, n: int, index, first, state: Array) -> Array:
    """The state after a chunk of head n, from the one before it."""
    start = _aligned(index, spec.tiling)
    k, v = (spec.load(refs, x, n, start, first) for x in ("k", "v"))
    if spec.channels:
        _, whole, total = chunk_levels(spec, refs, n, start, first, bonus=False)
        return next_state(state, k, v, whole.write, total)
    return next_head_state(state, k, v, chunk_decay(spec, refs, n, index, bonus=False))


def _aligned(index, tiling: Tiling):
    return pl.multiple_of(index * tiling.chunk, tiling.chunk)
