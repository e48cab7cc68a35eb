"""The portable linear_recurrence against lax.scan and lax.associative_scan on CPU, in one interleaved run.

python -m experiments.benchmarks.linear_recurrence_cpu
"""

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import frugax

RESULTS = Path(__file__).parent / "results" / "linear_recurrence_cpu.json"


def ours(a_BTD, b_BTD):
    return frugax.kernels.linear_recurrence(a_BTD, b_BTD, backend="xla")[0]


def token_scan(a_BTD, b_BTD):
    def step(h_BD, token):
        h_BD = token[0] * h_BD + token[1]
        return h_BD, h_BD

    tokens = jnp.moveaxis(a_BTD, 1, 0), jnp.moveaxis(b_BTD, 1, 0)
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(b_BTD[:, 0]), tokens)[1], 0, 1)


def associative_scan(a_BTD, b_BTD):
    def compose(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(compose, (a_BTD, b_BTD), axis=1)[1]


CONTENDERS = {"frugax": ours, "lax.scan": token_scan, "lax.associative_scan": associative_scan}


def with_gradient(f):
    def run(a, b, dh):
        h, vjp = jax.vjp(f, a, b)
        return h, vjp(dh)

    return run


def measure(shape: tuple[int, int, int], repeats: int) -> dict:
    """Milliseconds and bytes of temporaries for each contender and pass; raises if their numbers differ."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b, dh = (jax.random.normal(key, shape) for key in keys)
    a = jax.nn.sigmoid(a + 2)
    programs, answers = {}, {}
    for name, f in CONTENDERS.items():
        for what, g, args in (("forward", f, (a, b)), ("forward+gradient", with_gradient(f), (a, b, dh))):
            compiled = jax.jit(g).lower(*args).compile()
            programs[name, what] = compiled, args
            answers[name, what] = compiled(*args)
    for name, what in programs:
        pairs = zip(*(jax.tree.leaves(answers[n, what]) for n in (name, "lax.scan")), strict=True)
        for x, y in pairs:
            error = float(jnp.sqrt(jnp.mean((x - y) ** 2) / jnp.mean(y**2)))
            if not error < 1e-5:
                raise AssertionError(f"{name}, {what}: {error:.1e} from lax.scan; no time is worth reporting")
    milliseconds: dict[tuple[str, ...], list[float]] = {key: [] for key in programs}
    for _ in range(repeats):  # interleaved, so that what else runs here slows all alike
        for key, (compiled, args) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            milliseconds[key].append(1e3 * (time.perf_counter() - start))
    return {
        f"{name}, {what}": {
            "median_ms": round(float(np.median(times)), 2),
            "min_ms": round(min(times), 2),
            "temporary_MB": round(programs[name, what][0].memory_analysis().temp_size_in_bytes / 1e6, 1),
        }
        for (name, what), times in milliseconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=["4,2048,512", "1,2048,256"], help="batch,time,channels"
    )
    parser.add_argument("--repeats", type=int, default=21, help="timed runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "frugax": frugax.__version__,
        "dtype": "float32",
        "repeats": args.repeats,
        "results": {str(list(shape)): measure(shape, args.repeats) for shape in shapes},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
