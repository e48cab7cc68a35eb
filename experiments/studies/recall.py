"""Recall over the bytes of a state: small models look up pairs of tokens that they have read.

  python -m experiments.studies.recall                half an hour on two cores; writes the JSON
  python -m experiments.studies.recall --only based   the models that the regex finds, added to the JSON
  python -m experiments.studies.recall --smoke        one model for a few steps; writes nothing

A row of multi-query associative recall has pairs of a key and a value, then each key once more in another
order; the model says the key's value there. A recurrence has to hold all pairs in its state, and a window of
exact attention sees as many tokens as it keeps. Every model is a gated convolution of three taps, as Based's
are, before the mixers named; all is trained on fresh rows at two learning rates, of which the better counts.

Source: Arora et al. 2024, Based (arXiv 2402.18668), figure 2; the task is that of Zoology (2312.04927).
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import frugax
from experiments.benchmarks.interleaved import about, write

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "recall.json"
PAIRS, KEYS, VALUES = 8, 16, 16  # in a row, and to draw from
WIDTH, BATCH, STEPS, RATES = 32, 64, 1200, (3e-3, 1e-2)
HELD_OUT = 256  # rows


def mixers() -> dict[str, dict[str, list[tuple[str, dict[str, Any]]]]]:
    """Each kind of model at growing sizes of its state, by what grows."""

    def linear(key_size: int) -> tuple[str, dict[str, Any]]:
        return "LinearAttention", {"heads": 1, "feature_map": "taylor", "key_size": key_size}

    def window(size: int) -> tuple[str, dict[str, Any]]:
        return "SlidingWindowAttention", {"heads": 1, "window": size}

    return {
        "window": {f"{w} tokens": [window(w)] for w in (2, 4, 8, 16, 24)},
        "taylor": {f"keys of {k}": [linear(k)] for k in (1, 2, 4, 8)},
        "based": {f"keys of {k}, window 4": [linear(k), window(4)] for k in (1, 2, 4, 8)},
        "gla": {
            f"keys of {k}": [("GatedLinearAttention", {"heads": 1, "expand_k": k / WIDTH})]
            for k in (2, 8, 32)
        },
        "mamba2": {
            f"state of {n}": [("Mamba2", {"heads": 1, "expand": 1, "state_size": n})] for n in (2, 8, 32)
        },
    }


def rows(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [count, 3 PAIRS], and the value that is asked for at each of the last PAIRS places."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_keys, of_values, of_order = jax.random.split(key, 3)
        keys = jax.random.permutation(of_keys, KEYS)[:PAIRS]
        values = jax.random.randint(of_values, (PAIRS,), 0, VALUES)
        order = jax.random.permutation(of_order, PAIRS)
        pairs = jnp.stack([keys, KEYS + values], axis=1).reshape(-1)
        return jnp.concatenate([pairs, keys[order]]), KEYS + values[order]

    return jax.vmap(one)(jax.random.split(key, count))


def run(parts: list[tuple[str, dict[str, Any]]], steps: int) -> dict[str, Any]:
    """The bytes of a row's state, and the share of values recalled after training at each rate."""
    blocks = tuple(
        frugax.layers.Block(mixer, None, arguments)
        for mixer, arguments in [("GatedConvolution", {"width": 3, "expand": 1}), *parts]
    )
    module = frugax.layers.Decoder(KEYS + VALUES, WIDTH, blocks, tie_embeddings=False, backend="xla")
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]

    def answers(params: Any, tokens: jax.Array) -> jax.Array:
        return module.apply({"params": params}, tokens)[0][:, -PAIRS:]

    def train(rate: jax.Array) -> jax.Array:
        schedule = optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10 + 1, steps)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

        def loss(params: Any, tokens: jax.Array, wanted: jax.Array) -> jax.Array:
            found = answers(params, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(found, wanted).mean()

        def step(carry: Any, n: jax.Array) -> tuple[Any, None]:
            params, state = carry
            gradient = jax.grad(loss)(params, *rows(jax.random.fold_in(jax.random.key(1), n), BATCH))
            updates, state = optimizer.update(gradient, state)
            updates = jax.tree.map(lambda u: -rate * schedule(n) * u, updates)
            return (optax.apply_updates(params, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        tokens, wanted = rows(jax.random.key(2), HELD_OUT)
        return jnp.mean(jnp.argmax(answers(trained, tokens), -1) == wanted)

    _, state = jax.eval_shape(lambda p: module.apply({"params": p}, jnp.zeros((1, 8), jnp.int32)), params)
    held = [x for x in jax.tree.leaves(state.layers[1:]) if x.ndim > 2]  # of the mixers; no counts of tokens
    reached = jax.jit(jax.vmap(train))(jnp.array(RATES))
    return {
        "state_bytes": sum(x.size * x.dtype.itemsize for x in held),
        "parameters": int(optax.tree.size(params)),
        "recalled": round(float(max(reached)), 4),
        "at_each_rate": [round(float(x), 4) for x in reached],
    }


def save(out: Path, row: dict[str, Any]) -> None:
    """Put a row in the JSON, in the place of an earlier one of the same model."""
    order = [(kind, size) for kind, sizes in mixers().items() for size in sizes]
    kept = json.loads(out.read_text())["rows"] if out.exists() else []
    found = {(r["kind"], r["size"]): r for r in (*kept, row)}
    task: dict[str, Any] = {
        "pairs": PAIRS,
        "keys": KEYS,
        "values": VALUES,
        "width": WIDTH,
        "steps": STEPS,
        "batch": BATCH,
    }
    task |= {"learning_rates": RATES, "rows": [found[name] for name in order if name in found]}
    write(out, about() | task)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one model for a few steps; writes nothing")
    parser.add_argument("--only", default="", help="regex of models, such as 'based' or 'window 1'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args(argv)
    only, steps = ("based keys of 2,", 3) if args.smoke else (args.only, STEPS)
    for kind, sizes in mixers().items():
        for size, parts in sizes.items():
            if not re.search(only, f"{kind} {size}"):
                continue
            start = time.monotonic()
            row = {"kind": kind, "size": size} | run(parts, steps)
            seconds = time.monotonic() - start
            print(
                f"{kind} {size}: {row['state_bytes']} bytes, {row['recalled']:.3f}, {seconds:.0f} s",
                flush=True,
            )
            if not args.smoke:
                save(args.out, row)


if __name__ == "__main__":
    main()
