"""Products of rows with their experts on CPU, and a mixture's step against the dense one of equal FLOPs.

With memory that is kept, as `experiments.train` runs: a mixture's gradients are much of it. Turns in which
the cores share no cache have rows of their own, where that can be told.

python -m experiments.benchmarks.grouped_matmul_cpu
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import frugax
from experiments.benchmarks.core_latency import apart
from experiments.benchmarks.interleaved import about, save, with_gradient, worst_error
from experiments.trainer.kept_memory import keep_memory

RESULTS = Path(__file__).parent / "results" / "grouped_matmul_cpu.json"
BOUND = 1e-5  # rmse over rms
ENOUGH = 5  # turns of which a median is told


def of_one_matrix(x: Array, W: Array, sizes: Array) -> Array:
    """All rows times one matrix: as many FLOPs, another answer."""
    return x @ W[0]


def every_expert(x: Array, W: Array, sizes: Array) -> Array:
    """Each row times every expert, of which one is kept."""
    mine = jax.nn.one_hot(jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x)), len(sizes))
    return jnp.einsum("me,mk,ekn->mn", mine, x, W)


PRODUCTS: dict[str, Callable] = {
    "one dense product": of_one_matrix,
    "grouped_matmul": partial(frugax.kernels.grouped_matmul, backend="xla"),
    "jax.lax.ragged_dot": jax.lax.ragged_dot,
    "einsum over all experts": every_expert,
}


def group_sizes(rows: int, experts: int, skewed: bool) -> Array:
    """Rows of each expert: as chance has it, or by Zipf's law."""
    share = 1 / np.arange(1, experts + 1) if skewed else np.ones(experts)
    sizes = np.random.default_rng(0).multinomial(rows, share / share.sum())
    return jnp.asarray(sizes, jnp.int32)


def measure_products(rows: int, width: int, columns: int, experts: int, skewed: bool, turns: int) -> dict:
    """Times of the products alone, forward and with both gradients."""
    kx, kw, kd = jax.random.split(jax.random.key(0), 3)
    x, W = jax.random.normal(kx, (rows, width)), jax.random.normal(kw, (experts, width, columns))
    dy, sizes = jax.random.normal(kd, (rows, columns)), group_sizes(rows, experts, skewed)
    calls, answers, temporaries = {}, {}, {}
    for name, f in PRODUCTS.items():
        of_sizes = partial(lambda f, x, W: f(x, W, sizes), f)
        for what, g, given in (
            ("forward", of_sizes, (x, W)),
            ("forward+gradient", with_gradient(of_sizes), (dy, x, W)),
        ):
            compiled = jax.jit(g).lower(*given).compile()
            calls[name, what] = partial(compiled, *given)
            answers[name, what] = compiled(*given)
            temporaries[name, what] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    for (name, what), answer in answers.items():
        if name != "one dense product":
            check(f"{name}, {what}", answer, answers["grouped_matmul", what])
    return timed(calls, "one dense product", temporaries, turns)


def mixture(params: dict, x: Array, k: int, routed: str) -> Array:
    """A step's layer: top-k routing, gated experts, their weighted sum."""
    routing = frugax.moe.softmax_top_k(x @ params["router"], k)
    experts = params["experts"]
    if routed == "definition":
        weights = jnp.zeros((len(x), routing.experts))
        weights = weights.at[jnp.arange(len(x))[:, None], routing.indices].add(routing.weights)
        return frugax.moe.dense_experts(x, weights, experts)
    if routed == "dispatch":
        rows, plan = frugax.moe.dispatch(x, routing)
        return frugax.moe.combine(frugax.moe.apply_experts(rows, experts, plan.group_sizes), plan)
    return frugax.moe.routed_experts(x, routing, experts)


def dense(params: dict, x: Array) -> Array:
    """A gated layer that multiplies as often: k times as wide as an expert."""
    gate, up = jnp.split(x @ params["gate_in"], 2, axis=1)
    return (jax.nn.silu(gate) * up) @ params["out"]


def measure_step(tokens: int, width: int, hidden: int, experts: int, k: int, turns: int) -> dict:
    """Times of a dropless step, value and gradients of all params and of x."""
    keys = iter(jax.random.split(jax.random.key(1), 8))

    def normal(*shape: int) -> Array:
        return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

    x = jax.random.normal(next(keys), (tokens, width))
    of_experts = {"gate_in": normal(experts, width, 2 * hidden), "out": normal(experts, hidden, width)}
    sparse = {"router": normal(width, experts), "experts": of_experts}
    wide = {"gate_in": normal(width, 2 * k * hidden), "out": normal(k * hidden, width)}

    def step(f: Callable) -> Callable:
        return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(f(params, x))), (0, 1))

    ways = {name: partial(mixture, k=k, routed=name) for name in ("dispatch", "routed_experts")}
    named = {"dense layer": (dense, wide)} | {name: (f, sparse) for name, f in ways.items()}
    want = jax.jit(step(partial(mixture, k=k, routed="definition")))(sparse, x)
    calls, temporaries = {}, {}
    for name, (f, params) in named.items():
        compiled = jax.jit(step(f)).lower(params, x).compile()
        calls[name, "step"] = partial(compiled, params, x)
        temporaries[name, "step"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        if f is not dense:
            check(name, compiled(params, x), want)
    return timed(calls, "dense layer", temporaries, turns)


def check(name: str, got: Any, want: Any) -> None:
    """Raise AssertionError for a wrong answer: none of its times is worth reporting."""
    error = worst_error(got, want)
    if not error < BOUND:
        raise AssertionError(f"{name}: {error:.1e} from the definition; {BOUND:.0e} is the bound")


def timed(calls: dict, floor: str, temporaries: dict, turns: int) -> dict:
    """Rows of milliseconds and of CPU seconds, and of both over those of `floor` in the same turn.

    Turns with cores together and apart have rows of their own, one in which they moved has none; until there
    are enough of both there may be four times as many turns.
    """
    found: dict[Any, list] = {(place, *key): [] for place in (False, True) for key in calls}
    for i in range(4 * turns):
        enough = all(len(measured) >= ENOUGH for measured in found.values())
        if i >= turns and (enough or apart() is None):
            break
        turn = {key: _measure(call) for key, call in calls.items()}
        for (name, what), (place, *cost) in turn.items():
            of_floor, *floors = turn[floor, what]
            if place == of_floor and place is not None:
                found[place, name, what].append((cost, floors))
    rows = {}
    for (place, name, what), measured in found.items():
        if len(measured) >= min(ENOUGH, turns):
            cost, floors = np.moveaxis(np.array(measured), 0, -1)  # [ms or CPU ms, turn]
            times, cpu_times = np.median(cost / floors, axis=1).round(2).tolist()
            rows[f"{name}, {what}" + (", cores apart" if place else "")] = {
                "turns": len(measured),
                "median_ms": round(float(np.median(cost[0])), 2),
                "min_ms": round(float(cost[0].min()), 2),
                "times_the_dense": times,
                "cpu_times_the_dense": cpu_times,
                "temporary_MB": round(temporaries[name, what], 1),
            }
    return rows


def _measure(call: Callable[[], Any]) -> tuple[bool | None, float, float]:
    """True where cores were apart, None if they moved; milliseconds; CPU milliseconds."""
    before, start, cpu = apart(), time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    spent = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu)
    return bool(before) if before == apart() else None, *spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12, help="of each product; four times as many of a step")
    parser.add_argument("--small", action="store_true", help="sizes that take a second: a rehearsal")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    keep_memory()
    scale = 16 if args.small else 1
    M, K, N = 4096 // scale, 512 // scale, 1024 // scale
    results = {}
    for E, skewed in ((8, False), (8, True), (32, True)):
        what = f"{M} rows, {E} experts of {K} x {N}, {'skewed' if skewed else 'balanced'}"
        results[what] = measure_products(M, K, N, E, skewed, args.turns)
    for T, E, k, H in ((M // 2, 8, 2, K), (M // 2, 32, 4, K // 2), (2 * M, 32, 4, K // 2)):
        what = f"a step of {T} tokens, {k} of {E} gated experts of {K} x {H}"
        results[what] = measure_step(T, K, H, E, k, 4 * args.turns)
    save(args.out, about() | {"turns": args.turns, "results": results})


if __name__ == "__main__":
    main()
