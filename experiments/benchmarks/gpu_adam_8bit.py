"""The fused 8-bit Adam step on a Hopper GPU, as a share of what a copy of as many bytes reaches.

  python -m experiments.benchmarks.gpu_adam_8bit
  python -m experiments.benchmarks.gpu_adam_8bit --deviceless     compile for H200 and report; needs no GPU

The step reads and writes a gradient and the codes and scales of two moments, once each. Its update must
agree with the definition's on a smaller leaf; then it is timed by turns with the same step in plain JAX.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import frugax
from experiments.benchmarks import gpu
from experiments.benchmarks.interleaved import worst_error

HYPER = (0.9, 0.999, 1e-8, 1.0, 1.0)
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}  # of the update


@dataclasses.dataclass(frozen=True)
class Step:
    """One leaf, whose moments have seen other gradients."""

    group_size: int
    dtype: str
    formats: tuple[str, str]
    rows: int = 16384
    columns: int = 16384

    def arrays(self) -> tuple[Any, Any]:
        """(gradient, moments)"""
        kg, km = jax.random.split(jax.random.key(0))
        gradient = jax.random.normal(kg, (self.rows, self.columns), self.dtype)
        before = jax.random.normal(km, gradient.shape)
        moments = tuple(
            frugax.formats.quantize(x, name, axis=-1, group_size=self.group_size)
            for x, name in zip((before, before**2), self.formats, strict=True)
        )
        return gradient, moments


SHAPES = [
    Step(group_size, dtype, formats)
    for formats in (("mulaw8", "ufp8_e4m4"), ("dynamic8", "udynamic8"))
    for group_size in (256, 2048)
    for dtype in ("float32", "bfloat16")
]
TINY = [Step(128, "float32", ("mulaw8", "ufp8_e4m4"), rows=9, columns=256)]


def step(backend: str | None, donate: bool = True):
    """A step in place, as training does it: the update takes the gradient's memory."""
    run = lambda g, m: frugax.kernels.quantized_update("adam", g, m, HYPER, backend=backend)  # noqa: E731
    return jax.jit(run, donate_argnums=(0, 1) if donate else ())


def measure(shapes: list[Step], effort: gpu.Effort) -> Iterator[dict[str, Any]]:
    """Yield median times of the kernel and of plain JAX, and the kernel's share of a copy's rate."""
    rate = gpu.copy_rate()
    for shape in shapes:
        small = dataclasses.replace(shape, rows=min(shape.rows, 512)).arrays()
        updates = [step(b, donate=False)(*small)[0].astype(jnp.float32) for b in ("pallas_gpu", "reference")]
        error = worst_error(*updates)
        if not error < BOUND[shape.dtype]:  # no time of a wrong answer is worth reporting
            yield dataclasses.asdict(shape) | {"median_ms": {}, "error": error}
            continue
        arrays = shape.arrays()
        moved = 2 * sum(x.nbytes for x in jax.tree.leaves(arrays))
        state = {name: jax.tree.map(jnp.copy, arrays) for name in ("pallas_gpu", "xla")}
        steps = {name: step(name) for name in state}
        times: dict[str, list[float]] = {name: [] for name in state}

        def again(name, steps=steps, state=state):
            state[name] = steps[name](*state[name])
            return state[name]

        for name in state:
            jax.block_until_ready(again(name))
        for _ in range(effort.repeats):
            for name, mine in times.items():
                mine.append(gpu.milliseconds(partial(again, name), jax.block_until_ready))
        medians = {name: statistics.median(t) for name, t in times.items()}
        row = dataclasses.asdict(shape) | {
            "median_ms": {name: round(t, 4) for name, t in medians.items()},
            "share_of_copy": {name: round(1e3 * moved / rate / t, 3) for name, t in medians.items()},
            "copy_gb_a_second": round(rate / 1e9),
            "error": error,
        }
        yield row


def deviceless(shapes: list[Step]) -> list[dict[str, Any]]:
    """Registers and spills of each compiled kernel."""
    rows = []
    for shape in shapes:
        arrays = jax.eval_shape(shape.arrays)
        what = f"{shape.formats[0]}, {shape.dtype}, groups of {shape.group_size}"
        program = lambda a: frugax.kernels.quantized_update("adam", *a, HYPER)  # noqa: E731
        rows.append(gpu.compiled(shape, program, arrays, what=what, prefix="quantized_update_adam"))
    return rows


if __name__ == "__main__":
    gpu.main(__doc__, "adam_8bit", SHAPES, measure, deviceless, TINY)
