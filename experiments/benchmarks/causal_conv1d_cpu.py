"""The portable causal_conv1d against XLA's own grouped convolution on CPU, in one interleaved run.

python -m experiments.benchmarks.causal_conv1d_cpu
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

RESULTS = Path(__file__).parent / "results" / "causal_conv1d_cpu.json"


def ours(x_BTD, weight_WD, bias_D):
    return frugax.kernels.causal_conv1d(x_BTD, weight_WD, bias_D, activation="silu", backend="xla")[0]


def grouped_convolution(x_BTD, weight_WD, bias_D):
    W, D = weight_WD.shape
    z_BTD = jax.lax.conv_general_dilated(
        x_BTD,
        weight_WD[:, None],
        window_strides=(1,),
        padding=[(W - 1, 0)],
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=D,
    )
    return jax.nn.silu(z_BTD + bias_D)


def with_gradient(f):
    def run(x, weight, bias, dy):
        y, vjp = jax.vjp(f, x, weight, bias)
        return y, vjp(dy)

    return run


def measure(shape: tuple[int, int, int], width: int, repeats: int) -> dict:
    """Milliseconds and bytes of temporaries for each contender and pass; raises if their numbers differ."""
    B, T, D = shape
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(B, T, D), (width, D), (D,), (B, T, D)]
    x, weight, bias, dy = (jax.random.normal(k, s) for k, s in zip(keys, sizes, strict=True))
    programs, answers = {}, {}
    for name, f in (("frugax", ours), ("conv_general_dilated", grouped_convolution)):
        for what, g, args in (
            ("forward", f, (x, weight, bias)),
            ("forward+gradient", with_gradient(f), (x, weight, bias, dy)),
        ):
            compiled = jax.jit(g).lower(*args).compile()
            programs[name, what] = compiled, args
            answers[name, what] = compiled(*args)
    for what in ("forward", "forward+gradient"):
        pairs = zip(
            *(jax.tree.leaves(answers[n, what]) for n in ("frugax", "conv_general_dilated")), strict=True
        )
        for a, b in pairs:
            error = float(jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2)))
            if not error < 1e-5:
                raise AssertionError(
                    f"{what}: the contenders differ by {error:.1e}; no time is worth reporting"
                )
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
    parser.add_argument("--shape", default="4,2048,512", help="batch, time, channels")
    parser.add_argument("--width", type=int, default=4, help="taps of the filter")
    parser.add_argument("--repeats", type=int, default=11, help="timed runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    B, T, D = map(int, args.shape.split(","))
    result = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "frugax": "0.1.0",
        "shape": [B, T, D],
        "width": args.width,
        "dtype": "float32",
        "activation": "silu",
        "repeats": args.repeats,
        "results": measure((B, T, D), args.width, args.repeats),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
