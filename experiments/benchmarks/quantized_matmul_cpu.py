"""Products with packed weights on CPU against float32, in one interleaved run.

python -m experiments.benchmarks.quantized_matmul_cpu
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from experiments.benchmarks.interleaved import about, milliseconds, save, worst_error

RESULTS = Path(__file__).parent / "results" / "quantized_matmul_cpu.json"
GROUP = 128
# name -> format, what quantized_matmul is given besides; ternary has one scale, mxfp4 its own groups.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "uint4": ("uint4", {}),
    "int3": ("int3", {}),
    "int2": ("int2", {}),
    "ternary": ("ternary", {}),
    "nf4": ("nf4", {}),
    "mxfp4": ("mxfp4", {}),
    "int8, activations int8": ("int8", {"activations": "int8"}),
    "int4, activations int8": ("int4", {"activations": "int8"}),
    "int4, look-ups": ("int4", {"method": "lut"}),
    "int2, look-ups": ("int2", {"method": "lut"}),
    "int1, look-ups": ("int1", {"method": "lut"}),
    "int1": ("int1", {}),
}
ROUNDED = 0.02  # of the products, where activations are rounded to 8 bits


def measure(tokens: int, size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Rows of milliseconds and packed megabytes, once every product is right."""
    W = jax.random.normal(jax.random.key(0), (size, size))
    x = jax.random.normal(jax.random.key(1), (tokens, size))
    calls: dict[str, Callable[[], Any]] = {}
    megabytes, temporaries = {"float32": W.nbytes / 1e6}, {}

    def add(name: str, f: Callable, w: Any) -> Any:
        compiled = jax.jit(f).lower(x, w).compile()
        calls[name] = partial(compiled, x, w)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        return compiled(x, w)

    add("float32", jnp.matmul, W)
    for name, (format, how) in CONTENDERS.items():
        group = None if format in ("ternary", "nf4", "mxfp4") else GROUP
        w = jax.jit(partial(frugax.formats.quantize, format=format, group_size=group))(W)
        y = add(name, partial(frugax.kernels.quantized_matmul, backend="xla", **how), w)
        error = worst_error(y, jax.jit(lambda x, w: x @ w.dequantize())(x, w))
        bound = ROUNDED if "activations" in how else 1e-5
        if not error < bound:
            raise AssertionError(f"{name}: {error:.1e} from float32; {bound:.0e} is the bound")
        megabytes[name] = w.nbytes / 1e6
    times = milliseconds(calls, repeats)
    of_float32 = float(np.median(times["float32"]))
    return {
        name: {
            "median_ms": round(float(np.median(t)), 3),
            "min_ms": round(min(t), 3),
            "times_as_fast_as_float32": round(of_float32 / float(np.median(t)), 2),
            "weights_MB": round(megabytes[name], 2),
            "temporary_MB": round(temporaries[name], 1),
        }
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--size", type=int, default=4096, help="W is [size, size]")
    parser.add_argument("--repeats", type=int, default=31, help="timed runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON to write")
    args = parser.parse_args()
    results = {f"{n} tokens": measure(n, args.size, args.repeats) for n in args.tokens}
    what = {"weights": [args.size, args.size], "group_size": GROUP, "repeats": args.repeats}
    save(args.out, about() | what | {"results": results})


if __name__ == "__main__":
    main()
