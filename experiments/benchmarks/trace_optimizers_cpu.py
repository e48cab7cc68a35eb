"""CPU seconds of tracing an optimizer's update on 72 leaves: this frugax, an earlier one, and Optax's GaLore.

python -m experiments.benchmarks.trace_optimizers_cpu [--before DIR]

The params are twelve layers of six matrices, each a leaf of its own. Every contender is measured in processes
of its own, which take turns: the first trace that a process makes, the later ones of the same optimizer, and
those of an optimizer made anew each time, as `optax.inject_hyperparams` makes it. Nothing is timed before two
layers were updated for real: the update is finite, the state keeps its tree, its shapes and its dtypes, and
the earlier frugax finds the same update.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import frugax
from experiments.benchmarks.earlier import commit, in_a_process
from experiments.benchmarks.interleaved import about, cpu_seconds, save

RESULTS = Path(__file__).parent / "results" / "trace_optimizers_cpu.json"
MATRICES = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "up": (64, 192), "down": (192, 64)}
LAYERS, RANK, AGAIN = 12, 16, 3
SAME = 1e-5  # relative, between the updates of two versions
OURS = {
    "galore": lambda: frugax.optim.galore(1e-3, rank=RANK),
    "apollo": lambda: frugax.optim.apollo(1e-3, rank=RANK),
    "q_galore": lambda: frugax.optim.q_galore(1e-3, rank=RANK),
    "trion": lambda: frugax.optim.trion(1e-3, rank=RANK),
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    **OURS,
    "optax.contrib.galore": lambda: optax.contrib.galore(1e-3, rank=RANK),
}


def params(layers: int) -> dict:
    """Random params of the model's shapes."""
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        f"layer_{i}": {name: {"kernel": draw(shape)} for name, shape in MATRICES.items()}
        for i in range(layers)
    }


def trace_seconds(optimizer: optax.GradientTransformation, tree: Any, state: Any) -> float:
    """CPU seconds of tracing a new jitted function that updates once."""
    return cpu_seconds(lambda: jax.jit(lambda g, s, p: optimizer.update(g, s, p)).trace(tree, state, tree))


def measure(name: str) -> dict:
    """Measure one contender, in a process of its own."""
    make = OPTIMIZERS[name]
    optimizer, tree = make(), jax.eval_shape(lambda: params(LAYERS))
    state = jax.eval_shape(optimizer.init, tree)
    first = trace_seconds(optimizer, tree, state)
    return {
        "leaves": len(jax.tree.leaves(tree)),
        "first_s": first,
        "again_s": [trace_seconds(optimizer, tree, state) for _ in range(AGAIN)],
        "made_anew_s": [trace_seconds(make(), tree, state) for _ in range(AGAIN)],
    }


def check(name: str) -> dict:
    """Update two layers for real, and report the norm of the update.

    Raises:
      AssertionError: the update is zero or not finite, or the state changes its tree, shapes or dtypes.
    """
    optimizer, tree = OPTIMIZERS[name](), params(2)
    before = jax.jit(optimizer.init)(tree)
    updates, after = jax.jit(optimizer.update)(tree, before, tree)
    kinds = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)  # noqa: E731
    if kinds(before) != kinds(after):
        raise AssertionError(f"{name}: the state changed from {kinds(before)} to {kinds(after)}")
    norm = float(optax.tree.norm(updates))
    if not (math.isfinite(norm) and norm > 0):
        raise AssertionError(f"{name}: the update's norm is {norm}")
    return {"norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="a folder with an earlier frugax, to measure that too"
    )
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each contender")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job, name = args.job
        print(json.dumps({"measure": measure, "check": check}[job](name) | {"frugax": frugax.__file__}))
        return
    result = about()
    contenders: dict[str, tuple[str, Path | None]] = {name: (name, None) for name in args.only}
    if args.before:
        result["before"] = commit(args.before)
        contenders |= {f"{name}, before": (name, args.before) for name in args.only if name in OURS}
    here = "experiments.benchmarks.trace_optimizers_cpu"
    norms = {
        label: in_a_process(here, "check", name, before=before)["norm"]
        for label, (name, before) in contenders.items()
    }
    for label, (name, _) in contenders.items():
        if abs(norms[label] - norms[name]) > SAME * norms[name]:
            raise AssertionError(f"{name}: its update's norm was {norms[label]} and is {norms[name]}")
    runs: dict[str, list[dict]] = {label: [] for label in contenders}
    for _ in range(args.repeats):
        for label, (name, before) in contenders.items():
            runs[label].append(in_a_process(here, "measure", name, before=before))
    median = lambda times: round(float(np.median(times)), 4)  # noqa: E731
    result["leaves"] = next(iter(runs.values()))[0]["leaves"]
    result["cpu_seconds"] = {
        label: {
            key: median([found[key] for found in all_of_it]) for key in ("first_s", "again_s", "made_anew_s")
        }
        for label, all_of_it in runs.items()
    }
    save(args.out, result)


if __name__ == "__main__":
    main()
