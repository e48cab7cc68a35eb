"""A small language model with each router of `frugax.moe`: its loss, its loads, and what it would drop.

  python -m experiments.studies.moe_routers              half an hour on two cores; writes the JSON
  python -m experiments.studies.moe_routers --smoke            two routers for a few steps; writes nothing

The model reads bytes of the standard library: two layers of MLGRU and a mixture of eight experts, 64 wide, of
which a token reads two. "dense" has one GLU as wide as two experts, so that all do the same work a token, but
for BlockFFN, where the number of experts varies. Runs of one seed share batches and the params that they have
in common, so a gap to the softmax router is of one seed. What is evaluated has every token served, but where
a capacity is named; "dropped" is the share of assignments that a capacity of 1.25 times the mean would turn
away in a batch of 2048 tokens.

Source: for the routers, `frugax.moe`; Hwang et al. 2023, Pre-gated MoE (arXiv 2308.12066); Song et al. 2025,
SmallThinker (2507.20984); Song et al. 2025, BlockFFN (2507.08771); Wang et al. 2025, MoTE (2506.14435).
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import frugax
from experiments.benchmarks.interleaved import about
from experiments.studies.low_bit_training import batches, text
from frugax.layers.channel.router import Router

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "moe_routers.json"
STEPS, RATE, SEEDS, EXPERTS, K = 300, 4e-3, 3, 8, 2
CAPACITY = 1.25  # times the mean load
CHUNK = 8  # tokens that BlockFFN's kernels read together
# BlockFFN's factors in its authors' code, of losses averaged over layers and in nats. They wait 1,000 of at
# least 10,000 steps and compare every 100; here it is a fifth of the steps, and every tenth.
LOCALITY, SPARSITY = 2e-3, frugax.moe.AdaptiveFactor(5e-2, stable=STEPS // 5, interval=10)
# Thirty-two small experts without gates, together nine tenths of the params of eight GLUs of 0.75.
BLOCKFFN: dict[str, Any] = dict(
    router="relu_route", experts=32, k=1, expand=0.25, expert="MLP", activation="silu", dispatch="dense"
)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A channel mixer by its arguments, further fields of its block, and what follows BlockFFN's loss."""

    channel: str
    args: dict[str, Any]
    block: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedule: frugax.moe.AdaptiveFactor | None = None


def moe(block: dict[str, Any] | None = None, **args: Any) -> Contender:
    return Contender("MoE", {"experts": EXPERTS, "k": K, "expand": 0.75} | args, block or {})


CONTENDERS: dict[str, Contender] = {
    "softmax": moe(),
    "dense": Contender("GLU", {"expand": 1.5}),
    "softmax, no losses": moe(loss_weights={"load_balance": 0.0, "z": 0.0}),
    "softmax, capacity": moe(dispatch="gather", capacity=CAPACITY),
    "sigmoid, balanced by a bias": moe(router="sigmoid_top_k", router_args={"rate": 1e-2}),
    "noisy top-k": moe(router="noisy_top_k"),
    "Sinkhorn": moe(router="sinkhorn_top_k"),
    "BASE, one expert twice as wide": moe(router="base", k=1, expand=1.5),
    "hash, one expert twice as wide": moe(
        router="hash_route", k=1, expand=1.5, router_args={"vocab_size": 256}
    ),
    "expert choice (sees later tokens)": moe(router="expert_choice"),
    "pre-attention": moe({"router_reads": "block"}),
    "pre-gated": moe({"router_reads": "previous"}),
    "BlockFFN": moe(**BLOCKFFN),
    "BlockFFN, no losses": moe(**BLOCKFFN, loss_weights={"activation_locality": 0.0, "chunk_sparsity": 0.0}),
    "BlockFFN, adaptive factor": Contender(
        "MoE", {**BLOCKFFN, "router_args": {"chunk": 64}}, schedule=SPARSITY
    ),
    "MoTE: shared, ternary experts": moe(shared_expand=0.75, ternary=True, k=1),
    "shared and one expert in full precision": Contender("GLU", {"expand": 1.5}),
}


def build(contender: Contender) -> Any:
    """The language model with this channel mixer."""
    block = frugax.layers.Block("MLGRU", contender.channel, (), contender.args, **contender.block)
    return frugax.layers.Decoder(256, 64, (block,), repeats=2, tie_embeddings=False)


def bits(logits: Any, rows: Any) -> Any:
    """Mean bits a byte of rows [B, T + 1]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean() / math.log(2)


def train(module: Any, steps: int, adaptive: frugax.moe.AdaptiveFactor | None = None) -> Any:
    """Make (seed, rows [steps, ...], held_out) -> variables after the steps, held-out bits a byte."""
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, max(steps // 10, 1), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1))
    layers = module.repeats * len(module.blocks)

    def auxiliary(sown, factor):
        """The losses to add, and of BlockFFN's the one that the factor follows."""
        if adaptive is None:
            return frugax.moe.total_loss(sown), jnp.zeros(())
        factors = {"chunk_sparsity": factor, "activation_locality": LOCALITY}
        weights = {name: x / layers / math.log(2) for name, x in factors.items()}
        followed = frugax.moe.total_loss(sown, {"chunk_sparsity": 1 / layers})
        return frugax.moe.total_loss(sown, weights), jax.lax.stop_gradient(followed)

    def loss(params, state, rows, key, factor):
        (logits, _), sown = module.apply(
            {"params": params} | state, rows[:, :-1], rngs={"router": key}, mutable=["moe", "router_state"]
        )
        moved = {name: value for name, value in sown.items() if name == "router_state"}
        added, followed = auxiliary(sown, factor)
        return bits(logits, rows) + added, (moved, followed)

    def step(carry, given):
        params, state, moments, factor = carry
        rows, key = given
        gradient = jax.grad(loss, has_aux=True)
        of_step = factor.factor if adaptive else None
        grads, (state, followed) = gradient(params, state, rows.astype(jnp.int32), key, of_step)
        factor = adaptive.update(factor, followed) if adaptive else None
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), state, moments, factor), None

    def run(seed, rows, held_out):
        held_out = held_out.astype(jnp.int32)
        rngs = {"params": jax.random.key(seed), "router": jax.random.key(50 + seed)}
        variables = dict(module.init(rngs, held_out[:1, :-1]))
        state = {name: value for name, value in variables.items() if name == "router_state"}
        carry = variables["params"], state, optimizer.init(variables["params"])
        carry += (adaptive.init() if adaptive else None,)
        keys = jax.random.split(jax.random.key(100 + seed), steps)
        (params, state, *_), _ = jax.lax.scan(step, carry, (rows, keys))
        variables = {"params": params} | state
        return variables, bits(module.apply(variables, held_out[:, :-1])[0], held_out)

    return run


def routings(module: Any, variables: Any, rows: np.ndarray) -> list[np.ndarray]:
    """The weights [tokens, experts] of every layer for rows of bytes."""
    found = []

    def look(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, Router) and context.method_name == "__call__":
            found.append(np.asarray(result[0].dense_weights(rows.size)))
        return result

    with jax.disable_jit(), nn.intercept_methods(look):
        module.apply(variables, jnp.asarray(rows, jnp.int32))
    return found


def of_loads(weights: list[np.ndarray]) -> dict[str, float]:
    """The evenness of loads, and what experts they make active, averaged over layers."""
    values = []
    for layer in weights:
        active = layer != 0
        load = active.sum(0)
        share = load / load.sum()
        chunks = active[: len(active) // CHUNK * CHUNK].reshape(-1, CHUNK, active.shape[1]).any(1)
        values.append(
            {
                "load_entropy": -np.sum(share * np.log(np.maximum(share, 1e-30))) / np.log(len(load)),
                "dropped_share": np.maximum(load - CAPACITY * load.mean(), 0).sum() / load.sum(),
                "active_share": active.mean(),
                "active_share_of_chunks": chunks.mean(),
            }
        )
    return {name: round(float(np.mean([v[name] for v in values])), 4) for name in values[0]}


def run(
    contender: Contender, data: np.ndarray, held_out: np.ndarray, steps: int, seeds: int
) -> dict[str, Any]:
    """Held-out bits a byte of each seed, and what the first seed's routers do."""
    module = build(contender)
    rows = np.stack([batches(data, seed, steps) for seed in range(seeds)])
    together = jax.jit(jax.vmap(train(module, steps, contender.schedule), in_axes=(0, 0, None)))
    variables, reached = together(jnp.arange(seeds), rows, held_out)
    first = jax.tree.map(lambda x: x[0], variables)
    row: dict[str, Any] = {
        "parameters": sum(x.size for x in jax.tree.leaves(first["params"])),
        "held_out_bits_per_byte": [round(float(x), 4) for x in reached],
    }
    found = routings(module, first, held_out[:16, :-1])
    return row | (of_loads(found) if found else {})


def with_gaps(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add each contender's mean gap to the softmax router, and its standard error over seeds."""
    for row in rows.values():
        gap = np.subtract(row["held_out_bits_per_byte"], rows["softmax"]["held_out_bits_per_byte"])
        error = gap.std(ddof=1) / len(gap) ** 0.5 if len(gap) > 1 else 0.0
        row |= {"gap": round(float(gap.mean()), 4), "standard_error": round(float(error), 4)}
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two routers for a few steps; writes nothing")
    parser.add_argument("--only", default="", help="contenders by name, separated by ';', added to the JSON")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    steps, seeds = (6, 1) if args.smoke else (STEPS, SEEDS)
    names = ["softmax", "sigmoid, balanced by a bias"] if args.smoke else list(CONTENDERS)
    names = args.only.split(";") if args.only else names
    for name in names:
        if name not in CONTENDERS:
            parser.error(f"--only: got {name!r}; expected names of {'; '.join(CONTENDERS)}")
    data, held_out = text()
    reached: dict[str, dict[str, Any]] = {}
    if args.only and args.out.exists():
        reached = json.loads(args.out.read_text())["rows"]
    for name in names:
        start = time.monotonic()
        reached[name] = run(CONTENDERS[name], data, held_out, steps, seeds)
        seconds = time.monotonic() - start
        print(f"{name:40} {reached[name]['held_out_bits_per_byte']} bits a byte, {seconds:.0f} s", flush=True)
        if not args.smoke and "softmax" in reached:
            task = {"model": "2 layers of MLGRU and experts, 64 wide", "steps": steps, "seeds": seeds}
            task |= {"experts": EXPERTS, "k": K, "capacity": CAPACITY, "learning_rate": RATE}
            in_order = {n: reached[n] for n in CONTENDERS if n in reached}
            args.out.write_text(json.dumps(about() | task | {"rows": with_gaps(in_order)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
