"""The frame of CPU benchmarks: contenders timed by turns in one run, once their numbers agree."""

import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import frugax


def milliseconds(calls: dict[Any, Callable[[], Any]], repeats: int) -> dict[Any, list[float]]:
    """Times of each call. By turns, so that what else runs on the machine slows all alike.

    Example:
        >>> {name: len(times) for name, times in milliseconds({"sum": lambda: jnp.ones(3).sum()}, 2).items()}
        {'sum': 2}
    """
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def cpu_seconds(call: Callable[[], Any]) -> float:
    """CPU seconds that this process spends in the call.

    Example:
        >>> cpu_seconds(lambda: sum(range(1000))) < 1
        True
    """
    start = time.process_time()
    call()
    return time.process_time() - start


def with_gradient(f: Callable) -> Callable:
    """(cotangent, *args) -> f(*args) and the gradient of every argument."""

    def run(cotangent, *args):
        y, vjp = jax.vjp(f, *args)
        return y, vjp(cotangent)

    return run


def compare(
    contenders: dict[str, Callable],
    args,
    cotangent,
    *,
    reference: str,
    bound: float,
    repeats: int,
    others: dict[tuple[str, str], Callable[[], Any]] | None = None,
):
    """Rows of median and least milliseconds and of temporaries, forward and with the gradient.

    Args:
      contenders: functions of `args` with one result, of `cotangent`'s shape.
      reference: the contender that the others must agree with to `bound`, as rmse over rms.
      others: what is not JAX: {(name, "forward" or "forward+gradient"): a call with the same result}.

    Raises:
      AssertionError: one of them doesn't: no time of a wrong answer is worth reporting.
    """
    calls: dict[Any, Callable[[], Any]] = {}
    answers, temporaries = {}, {}
    for name, f in contenders.items():
        for what, g, given in (
            ("forward", f, args),
            ("forward+gradient", with_gradient(f), (cotangent, *args)),
        ):
            compiled = jax.jit(g).lower(*given).compile()
            calls[name, what] = partial(compiled, *given)
            answers[name, what] = compiled(*given)
            temporaries[name, what] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    for key, call in (others or {}).items():
        calls[key], answers[key] = call, call()
    for name, what in calls:
        error = worst_error(answers[name, what], answers[reference, what])
        if not error < bound:
            raise AssertionError(f"{name}, {what}: {error:.1e} from {reference}; {bound:.0e} is the bound")
    return {
        f"{name}, {what}": {
            "median_ms": round(float(np.median(times)), 3),
            "min_ms": round(min(times), 3),
            "temporary_MB": round(temporaries[name, what], 1) if (name, what) in temporaries else None,
        }
        for (name, what), times in milliseconds(calls, repeats).items()
    }


def worst_error(actual, expected) -> float:
    """The largest rmse over rms of any leaf."""

    def error(a, b):
        return float(jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2)))

    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about() -> dict[str, Any]:
    """When, where and with what a benchmark ran."""
    there = os.cpu_count() or 1
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {there if cores() == there else f'{cores()} of {there}'} cores",
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "frugax": frugax.__version__,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def save(path: Path, result: dict[str, Any]) -> None:
    """Write and print the result."""
    write(path, result)
    print(json.dumps(result, indent=2))
