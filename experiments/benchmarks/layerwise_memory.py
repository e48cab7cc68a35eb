"""Memory of a training step that works on one layer of eight, of the compiled program: nothing is run.

  python -m experiments.benchmarks.layerwise_memory              a minute on a core; writes the JSON

A decoder of eight gated linear attention blocks. Temporaries are what a compiled step needs beside its
arguments and results, by XLA's own account, and state what the optimizer keeps between steps.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import frugax
from experiments.benchmarks.interleaved import about

RESULTS = Path(__file__).parent / "results" / "layerwise_memory.json"
WIDTH, DEPTH, TIME, BATCH = 128, 8, 128, 4


def rows(loss: Any, params: Any) -> dict[str, dict[str, int]]:
    """Each way's temporaries and state, in bytes."""
    optim, found = frugax.optim, {}
    ways = {
        "AdamW": (optax.adamw(1e-3), None),
        "lisa, gradients of all layers": (optim.lisa(1e-3, active=1), None),
        "lisa": (optim.lisa(1e-3, active=1), {}),
        "lisa, activations in int8": (optim.lisa(1e-3, active=1), {"keep": "int8"}),
        "badam": (optim.badam(1e-3), {}),
        "slimfit, activations in int8": (
            optim.slimfit(optax.adamw(1e-3), 7 / 8, together=True),
            {"keep": "int8"},
        ),
    }
    for name, (optimizer, options) in ways.items():

        def step(params, state, optimizer=optimizer, options=options):
            if options is not None:
                return optim.layerwise_step(optimizer, loss, params, state, **options)[:2]
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(optimizer.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
        found[name] = {
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        }
        print(name, found[name], flush=True)
    return found


def main() -> None:
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 4}, {"expand": 4.0})
    module = frugax.layers.Decoder(256, WIDTH, (block,), repeats=DEPTH, backend="xla")
    tokens = jnp.zeros((BATCH, TIME + 1), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), tokens)["params"]

    def loss(params):
        logits, _ = module.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    result = {
        "model": f"{DEPTH} blocks of gated linear attention, {WIDTH} wide, {BATCH} x {TIME} tokens",
        "parameters": int(optax.tree.size(params)),
    }
    RESULTS.write_text(json.dumps(about() | result | {"rows": rows(loss, params)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
