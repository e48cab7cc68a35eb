"""One row of `CASES` in this process: values and gradients of the Mosaic GPU kernel against float64.

    python -m experiments.benchmarks.hopper.conformance "rnn, gru" --output FILE [--rehearse]

Each case is written when it is done. The process fails if one is wrong. The definition, backend "reference",
runs in float64 on the CPU.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cases import CASES, Case
from .jobs import first_lines, write_json

# How many units in the last place the arithmetic explains: float32 sums have many terms; a bfloat16 kernel
# adds up in float32, so that the rounding of a few operands remains, and a float16 one likewise.
UNITS = {"float32": 64, "bfloat16": 1, "float16": 1}


def bound(case: Case) -> float:
    """Return the largest rmse over rms that is right: the narrowest dtype of the inputs decides."""
    floats = [np.dtype(x.dtype) for x in jax.tree.leaves(case.arrays) if is_float(x)]
    return case.times * max(UNITS[d.name] * float(jnp.finfo(d).eps) for d in floats)


def is_float(x: Any) -> bool:
    """Say if x has a floating dtype; bfloat16 is one."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def values_and_gradients(case: Case, arrays: dict[str, Any], backend: str) -> dict[str, Any]:
    """Return each output, and the gradient of each float array for the same random cotangents."""
    rest = {name: x for name, x in arrays.items() if not hasattr(x, "dtype") or not is_float(x)}
    floats = {name: jnp.asarray(x) for name, x in arrays.items() if name not in rest}

    @jax.jit
    def run(floats):
        def call(floats):
            out = case.call(**floats, **rest, backend=backend)
            return out if isinstance(out, tuple) else (out,)

        if not case.gradients:
            return call(floats), {}
        out, pullback = jax.vjp(call, floats)
        rng = np.random.default_rng(7)
        cotangents = (rng.standard_normal(x.shape).astype(jnp.bfloat16) for x in out)
        return out, pullback(tuple(jnp.asarray(c, x.dtype) for c, x in zip(cotangents, out, strict=True)))[0]

    out, gradients = run(floats)
    results = {f"output {n}": x for n, x in enumerate(out)} | {f"d {n}": x for n, x in gradients.items()}
    return {name: np.asarray(x, np.float64) for name, x in results.items()}


def expected(case: Case) -> dict[str, Any]:
    """Return the same by the definition, in float64 where there is a gradient, on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        if not case.gradients:
            on_cpu = jax.tree.map(lambda x: jax.device_put(x, jax.devices("cpu")[0]), case.arrays)
            return values_and_gradients(case, on_cpu, "reference")
        with jax.enable_x64(True):
            wide = {n: np.asarray(x, np.float64) if is_float(x) else x for n, x in case.arrays.items()}
            return values_and_gradients(case, wide, "reference")


def error(actual: np.ndarray, wanted: np.ndarray) -> float:
    """Return rmse over rms; infinity where a value is not finite or the shapes differ.

    Example:
        >>> error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == 0.5**0.5 / 12.5**0.5
        True
    """
    if actual.shape != wanted.shape or not np.isfinite(actual).all():
        return float("inf")
    return float(np.sqrt(np.mean((actual - wanted) ** 2) / np.mean(wanted**2)))


def check(case: Case) -> dict[str, Any]:
    """Return the case's errors, and whether all of them are within the bound."""
    got, wanted = values_and_gradients(case, case.arrays, "pallas_gpu"), expected(case)
    errors = {name: error(x, wanted[name]) for name, x in got.items()}
    limit = bound(case)
    return {
        "case": case.what,
        "right": all(e <= limit for e in errors.values()),
        "bound": float(f"{limit:.2g}"),
        "errors": {name: float(f"{e:.2g}") for name, e in errors.items()},
    }


def main() -> None:
    """Check the row that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    for case in CASES[options.name](options.rehearse):
        print(f"{options.name}: {case.what}", flush=True)
        try:
            done.append(check(case))
        except Exception as problem:  # the other shapes are tried all the same
            traceback.print_exc()
            done.append(
                {"case": case.what, "right": False, "problem": first_lines(f"Traceback\n{problem!r}")}
            )
        print(done[-1], flush=True)
        write_json(options.output, done)
    if not all(row["right"] for row in done):
        sys.exit(1)


if __name__ == "__main__":
    main()
