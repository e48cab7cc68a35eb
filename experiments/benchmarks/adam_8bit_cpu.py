"""A step of 8-bit AdamW against optax's on CPU: 50 M parameters in a decoder's shapes, one interleaved run.

python -m experiments.benchmarks.adam_8bit_cpu
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frugax

RESULTS = Path(__file__).parent / "results" / "adam_8bit_cpu.json"


def shapes(width: int = 512, layers: int = 14, vocabulary: int = 8192) -> dict[str, tuple[int, ...]]:
    """The leaves of a decoder whose layers are stacked: 50.5 M parameters."""
    return {
        "embedding": (vocabulary, width),
        "attention": (layers, width, 4 * width),
        "up": (layers, width, 4 * width),
        "down": (layers, 4 * width, width),
        "norms": (2 * layers, width),
    }


def measure(leaves: dict[str, tuple[int, ...]], repeats: int) -> dict:
    """Milliseconds, temporaries and state bytes of each contender, and the ratio of paired times."""
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = {n: 0.02 * jax.random.normal(k, s) for k, (n, s) in zip(keys, leaves.items(), strict=True)}
    gradient = {n: 1e-3 * jnp.cos(1e3 * p) for n, p in params.items()}
    count = sum(p.size for p in params.values())
    programs, carries, results = {}, {}, {}
    times: dict[str, list[float]] = {}
    for name, tx in (("frugax", frugax.optim.adamw_8bit(1e-3)), ("optax", optax.adamw(1e-3))):

        def step(params, state, gradient, tx=tx):
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        own = jax.tree.map(jnp.copy, params)
        programs[name] = jax.jit(step, donate_argnums=(0, 1)).lower(own, state, gradient).compile()
        carries[name], times[name] = programs[name](own, state, gradient), []
        results[name] = {
            "temporary_bytes": programs[name].memory_analysis().temp_size_in_bytes,
            "state_bytes_per_parameter": frugax.optim.state_bytes(state) / count,
        }
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(program(*carries[name], gradient))
            times[name].append(1e3 * (time.perf_counter() - start))
    for name, result in results.items():
        result["milliseconds"] = float(np.median(times[name]))
    ratio = float(np.median(np.divide(times["frugax"], times["optax"])))
    return {"parameters": count, **results, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--tiny", action="store_true", help="a few thousand parameters, nothing written")
    args = parser.parse_args()
    if args.tiny:
        print(json.dumps(measure(shapes(64, 2, 100), 2), indent=1))
        return
    result = {
        "jax": jax.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **measure(shapes(), args.repeats),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
