"""The peak of a training step's memory on a Hopper GPU, beside what was planned for it without one.

  python -m experiments.benchmarks.gpu_memory_peak
  python -m experiments.benchmarks.gpu_memory_peak --deviceless     compile for H200 and report; needs no GPU

Steps are those of `experiments.studies.memory_estimators`, at sizes of 7 to 102 GB. Planned bytes are those
of the compiled step (`memory_analysis`), of formulas over layers, and of the jaxpr's liveness. The measured
peak is the allocator's, which never falls: each step has a process of its own. Nothing is timed.
"""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import gpu
from experiments.studies import memory_estimators as study


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of Adam: a family of the study, and the numbers of its config, in place of random ones.

    MLP: layers, width / 32, log2(batch). CNN: stages, first channels / 4, side / 8, log2(batch).
    Transformer: layers, heads, width / 16 heads, time / 32, log2(batch), whether layers are in a scan.
    """

    family: str
    numbers: tuple[int, ...]

    def config(self) -> study.Config:
        """The study's config of these numbers."""
        return study.FAMILIES[self.family](_Given(self.numbers))  # type: ignore[arg-type]


class _Given:
    """Stands for NumPy's generator: each draw is the next of given numbers."""

    def __init__(self, numbers: tuple[int, ...]):
        self._left = iter(numbers)

    def integers(self, *_: int) -> int:
        return next(self._left)

    choice = integers


SHAPES = [  # by their bytes: 7 to 52 GB, which a device of 80 GB has too, and 91 to 102 GB
    Step("Transformer", (6, 16, 4, 32, 2, 1)),
    Step("MLP", (16, 256, 15)),
    Step("Transformer", (12, 16, 8, 32, 3, 1)),
    Step("Transformer", (12, 16, 8, 64, 2, 0)),
    Step("CNN", (3, 16, 16, 11)),
    Step("Transformer", (12, 16, 8, 64, 3, 1)),
    Step("MLP", (32, 256, 16)),
    Step("CNN", (3, 16, 16, 12)),
]
TINY = [Step("Transformer", (2, 2, 1, 1, 0, 1)), Step("MLP", (2, 1, 5)), Step("CNN", (1, 1, 1, 3))]


def plan(step: Step, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """The row of a step before it runs: its sizes, and bytes by the compiler and both estimators."""
    config, memory = step.config(), compiled.memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    asked = memory.argument_size_in_bytes + new + memory.temp_size_in_bytes
    formulas, liveness = study.by_formula(config), study.by_liveness(config)
    return dataclasses.asdict(step) | {
        "params": sum(x.size for x in jax.tree.leaves(config.params)),
        "batch": list(config.batch.shape),
        "compiled_bytes": asked,
        "formulas_bytes": formulas,
        "liveness_bytes": liveness,
        "formulas_over_compiled": round(formulas / asked, 3),
        "liveness_over_compiled": round(liveness / asked, 3),
    }


def run(step: Step) -> dict[str, Any]:
    """Compile a step here, run it once, and return its row; a process that ran another has that one's peak.

    The row has "peak_bytes", or says why it is "unmeasured".
    """
    device = jax.devices()[0]
    f, args = study.step_of(step.config())
    compiled = jax.jit(f, donate_argnums=(0, 1)).lower(*args).compile()
    row, before = plan(step, compiled), device.memory_stats()
    if before is None:
        return row | {"unmeasured": f"{device.device_kind} does not count bytes"}
    room = before["bytes_limit"] - before["bytes_in_use"]
    if room < row["compiled_bytes"]:
        return row | {"unmeasured": f"the allocator has {room:,} bytes"}
    jax.block_until_ready(compiled(*jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), args)))
    found = device.memory_stats()["peak_bytes_in_use"]
    if found <= before["peak_bytes_in_use"]:  # of the trials by which the compiler chooses kernels
        return row | {"unmeasured": f"compiling took more: {before['peak_bytes_in_use']:,} bytes"}
    peak = found - before["bytes_in_use"]
    ratios = {
        f"{name}_over_peak": round(row[f"{name}_bytes"] / peak, 3)
        for name in ("compiled", "formulas", "liveness")
    }
    return row | {"peak_bytes": peak} | ratios


def measure(shapes: list[Step], effort: gpu.Effort) -> Iterator[dict[str, Any]]:
    """Yield the row of each step, run in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from pool.map(run, shapes)


def deviceless(shapes: list[Step]) -> list[dict[str, Any]]:
    """Planned bytes alone."""
    from experiments.benchmarks.deviceless_gpu import compile_for_h200

    rows = []
    for step in shapes:
        f, args = study.step_of(step.config())
        rows.append(plan(step, compile_for_h200(f, *args, donate_argnums=(0, 1))))
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    # The processes share the chip: one that is here to start the others must take nothing of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # 0.75 would be lent
    gpu.main(__doc__, "memory_peak", SHAPES, measure, deviceless, TINY)
