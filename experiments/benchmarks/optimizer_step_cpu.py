"""Step time of each memory-efficient optimizer over optax.adamw's on CPU, each pair interleaved in one run.

python -m experiments.benchmarks.optimizer_step_cpu

The params are those of a Llama-like model of 50 million: 8 stacked layers of width 640, a vocabulary of 8192.
As in training, the gradient is made inside the jitted step, so that an optimizer may overwrite it; what
making it takes alone is measured by turns with the rest and taken off. It keeps its memory, as training
does (`experiments.trainer.kept_memory`): otherwise page faults take longer than the arithmetic.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frugax
from experiments.benchmarks.interleaved import about, write
from experiments.trainer.kept_memory import keep_memory

RESULTS = Path(__file__).parent / "results" / "optimizer_step_cpu.json"
SHAPES = {
    "embedding": (8192, 640),
    "head": (8192, 640),
    "layers": {
        "mixer": {"qkv": {"kernel": (8, 640, 1920)}, "out": {"kernel": (8, 640, 640)}},
        "channel": {"gate_in": {"kernel": (8, 640, 3456)}, "out": {"kernel": (8, 1728, 640)}},
        "mixer_norm": {"weight": (8, 640)},
        "channel_norm": {"weight": (8, 640)},
    },
}
T = 200  # steps from refresh to refresh


def contenders(rank: int) -> dict[str, optax.GradientTransformation]:
    """The optimizers that are measured, each with the interval that it would train with."""
    of, rate = frugax.optim, 1e-3
    return {
        "apollo": of.apollo(rate, rank=rank),
        "galore": of.galore(rate, rank=rank),
        "galore (randomized)": of.galore(rate, rank=rank, projector="randomized"),
        "galore (svd)": of.galore(rate, rank=rank, projector="svd"),
        "fira": of.fira(rate, rank=rank),
        "natural_galore": of.natural_galore(rate, rank=rank),
        "q_galore": of.q_galore(rate, rank=rank),
        "frugal": of.frugal(rate, density=rank / 640),
        "dct_adamw": of.dct_adamw(rate, rank=rank),
        "trion": of.trion(rate, rank=rank),
        "cosmos": of.cosmos(rate, rank=rank),
    }


def without_rank() -> dict[str, optax.GradientTransformation]:
    """Those that have no rank, or a fixed one."""
    of, rate = frugax.optim, 1e-3
    dynamic = of.EightBit(signed="dynamic8", unsigned="udynamic8")
    return {
        "apollo_mini": of.apollo_mini(rate),
        "lisa": of.lisa(rate, active=2),
        "lion": of.lion(rate),
        "adamw_8bit": of.adamw_8bit(rate),
        "adamw_8bit (dynamic8)": of.adamw_8bit(rate, moments=dynamic),
    }


def normal_tree(seed: int, scale: float) -> dict:
    """Params, or gradients, of the model's shapes."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    shapes = jax.tree.leaves(SHAPES, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    each = iter(keys)
    return jax.tree.map(lambda s: scale * jax.random.normal(next(each), s), SHAPES, is_leaf=is_shape)


def backward(gradient, params):
    """The gradient as new arrays, which a branch keeps apart from what the optimizer fuses."""
    first = jax.tree.leaves(params)[0][0, 0]
    return jax.lax.cond(
        first < jnp.inf, partial(optax.tree.scale, 1.5), partial(optax.tree.scale, -1.5), gradient
    )


class Run:
    """An optimizer in the middle of training; None: the gradient alone."""

    def __init__(self, optimizer, gradient):
        def step(params, state, gradient):
            gradient = backward(gradient, params)
            if optimizer is None:
                return jax.tree.map(lambda p, g: p.at[0].add(g[0]), params, gradient), state
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.gradient, self.params = gradient, normal_tree(0, 0.02)
        self.state = () if optimizer is None else jax.jit(optimizer.init)(self.params)
        self.bytes = frugax.optim.state_bytes(self.state)
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(self.params, self.state, gradient).compile()
        self.temporary = self.step.memory_analysis().temp_size_in_bytes - 4 * optax.tree.size(gradient)
        self.first = self.milliseconds()  # a refresh, where there are any: step 0

    def milliseconds(self) -> float:
        """Time one more step."""
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, self.gradient))
        return 1e3 * (time.perf_counter() - start)


def measure(optimizer, gradient, repeats: int) -> dict:
    """Steps of `optimizer` and of AdamW by turns; the ratio is the median over pairs."""
    runs = mine, _, _ = [Run(tx, gradient) for tx in (optimizer, optax.adamw(1e-3), None)]
    times = np.array([[run.milliseconds() for run in runs] for _ in range(repeats)])
    pairs = times[:, :2] - times[:, 2:]
    if repeats >= T:
        raise ValueError(f"repeats: got {repeats}; below {T}, so that no refresh is among them, fits")
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(mine.params)):
        raise AssertionError("params are not finite; no time is worth reporting")
    ratio = float(np.median(pairs[:, 0] / pairs[:, 1]))
    between, base = (float(np.median(column)) for column in pairs.T)
    making = float(np.median(times[:, 2]))
    extra = max(mine.first - making - between, 0.0)
    return {
        "ms_between_refreshes": round(between, 1),
        "over_adamw_between_refreshes": round(ratio, 2),
        "ms_of_the_first_step": round(mine.first - making, 1),
        f"over_adamw_amortized_over_{T}": round(ratio + extra / T / base, 2),
        "adamw_ms": round(base, 1),
        "making_the_gradient_ms": round(making, 1),
        "state_bytes_per_parameter": round(mine.bytes / optax.tree.size(mine.params), 3),
        "temporary_MB": round(mine.temporary / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[160, 64, 32, 16], help="640 / 4 is the papers' share"
    )
    parser.add_argument("--only", nargs="+", help="names, or their beginnings; the file keeps the others")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    gradient = normal_tree(1, 1e-3)
    result = about() | {
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "parameters": int(optax.tree.size(gradient)),
        "results": json.loads(args.out.read_text())["results"] if args.only and args.out.exists() else {},
    }
    groups = {"any rank": without_rank(), **{f"rank {rank}": contenders(rank) for rank in args.ranks}}
    for group, optimizers in groups.items():
        for name, optimizer in optimizers.items():
            if args.only and not name.startswith(tuple(args.only)):
                continue
            found = measure(optimizer, gradient, args.repeats)
            found |= {"repeats": args.repeats, "date": result["date"], "load_average": os.getloadavg()[0]}
            result["results"].setdefault(group, {})[name] = found
            print(group, name, found, flush=True)
            write(args.out, result)


if __name__ == "__main__":
    keep_memory()
    main()
