"""Rows times their experts on Hopper: frugax, `lax.ragged_dot` and torch beside one dense product.

    python -m experiments.benchmarks.gpu_grouped_matmul                # on the chip
    python -m experiments.benchmarks.gpu_grouped_matmul --deviceless   # registers, spills: no chip

"dense" multiplies as many rows by the first expert alone: the same FLOPs without groups, so that it is timed
and not compared. What differs from the float32 definition is reported as wrong and not timed.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import frugax

from . import gpu

WORST_ERROR = 2.0**-7  # rmse over rms: bfloat16's epsilon
DRAWN = 1_000_003  # numbers that are drawn and then repeated: a prime, so that no two experts are alike


@dataclasses.dataclass(frozen=True)
class Shape:
    """M rows of K, by their experts [E, K, N]."""

    M: int
    K: int
    N: int
    E: int
    load: Literal["even", "zipf"] = (
        "even"  # the n-th expert has as many rows as others, or in proportion to 1/n
    )

    def sizes(self) -> np.ndarray:
        """Return the rows of each expert."""
        share = np.ones(self.E) if self.load == "even" else 1 / np.arange(1, self.E + 1)
        ends = np.round(self.M * np.cumsum(share) / share.sum()).astype(np.int32)
        return np.diff(ends, prepend=0)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of rows, experts, the result."""
        return [(self.M, self.K), (self.E, self.K, self.N), (self.M, self.N)]

    def arrays(self) -> list[np.ndarray]:
        """Return rows, experts, the result's cotangent, in bfloat16."""
        drawn = np.random.default_rng(0).standard_normal(DRAWN, np.float32).astype(jnp.bfloat16)
        return [np.resize(np.roll(drawn, 7 * n), shape) for n, shape in enumerate(self.shapes())]


SHAPES = [
    Shape(32768, 2048, 768, 128, "zipf"),  # Qwen3-30B-A3B, 4096 tokens to 8 experts each
    Shape(32768, 2048, 768, 128),
    Shape(8192, 4096, 14336, 8, "zipf"),  # Mixtral 8x7B, 4096 tokens to 2 experts each, in and out
    Shape(8192, 4096, 14336, 8),
    Shape(8192, 14336, 4096, 8),
    Shape(24576, 2048, 1408, 64, "zipf"),  # DeepSeek-V2-Lite, 4096 tokens to 6 experts each
    Shape(64, 2048, 768, 128),  # eight tokens in decoding
]
TINY = [Shape(20, 64, 64, 2, "zipf")]


def frugax_product(backend: str, shape: Shape) -> Callable[..., Any]:
    """Return the product by `frugax`."""
    sizes = jnp.asarray(shape.sizes())
    return lambda x, w: frugax.kernels.grouped_matmul(x, w, sizes, backend=backend)


def ragged_dot(shape: Shape) -> Callable[..., Any]:
    """Return the product by JAX's own operation."""
    sizes = jnp.asarray(shape.sizes())
    return lambda x, w: jax.lax.ragged_dot(x, w, sizes)


def dense(shape: Shape) -> gpu.Runner:
    """Return a product of as many FLOPs with one matrix."""
    x, w, cotangent = shape.arrays()
    return gpu.jax_runner(jnp.dot, [x, w[0], cotangent])


def in_jax(make: Callable[[Shape], Callable[..., Any]], shape: Shape) -> gpu.Runner:
    """Return the runner of a function in JAX."""
    return gpu.jax_runner(make(shape), shape.arrays())


def in_torch(shape: Shape) -> gpu.Runner:
    """Return torch's runner."""
    torch = importlib.import_module("torch")
    ends = torch.from_numpy(np.cumsum(shape.sizes(), dtype=np.int32)).to("cuda")
    return gpu.torch_runner(lambda x, w: torch._grouped_mm(x, w, offs=ends), shape.arrays())


CONTENDERS: dict[str, Callable[[Shape], gpu.Runner]] = {
    "frugax pallas_gpu": partial(in_jax, partial(frugax_product, "pallas_gpu")),
    "frugax xla": partial(in_jax, partial(frugax_product, "xla")),
    "lax.ragged_dot": partial(in_jax, ragged_dot),
    "torch._grouped_mm": in_torch,
}


def small(shape: Shape) -> Shape:
    """Return a shape for the definition with as many rows an expert, or enough for the same tiles."""
    E = min(shape.E, 8)
    M = min(-(-shape.M // shape.E), 128) * E
    return dataclasses.replace(shape, M=M, E=E, K=min(shape.K, 256), N=min(shape.N, 256))


def least_bytes(shape: Shape, passes: str) -> int:
    """Rows and experts read, the result written; gradients read all three again and write two."""
    x, w, y = shape.M * shape.K, shape.E * shape.K * shape.N, shape.M * shape.N
    forward = 2 * (x + w + y)
    return forward if passes == "forward" else forward + 2 * (2 * x + 2 * w + y)


def measure(shapes: list[Shape], effort: gpu.Effort) -> Iterator[dict[str, Any]]:
    """Yield a row a shape and pass: also the kernel's FLOPs a second, and its time over others'."""
    for row in gpu.measure(
        shapes,
        CONTENDERS,
        partial(frugax_product, "reference"),
        stand_in=small,
        bound=WORST_ERROR,
        least_bytes=least_bytes,
        effort=effort,
        beside={"dense": dense},
    ):
        ours = row["median_ms"].get("frugax pallas_gpu")
        if ours is not None:
            products = 1 if row["passes"] == "forward" else 3
            row["tera_flops_a_second"] = round(products * 2e-9 * row["M"] * row["K"] * row["N"] / ours, 1)
            row["times_as_fast_as"] = {who: round(ms / ours, 3) for who, ms in row["median_ms"].items()}
        yield row


def deviceless(shapes: list[Shape]) -> list[dict[str, Any]]:
    """Return registers and spills of each compiled kernel."""
    rows = []
    for shape in gpu.one_each(shapes, lambda shape: str(shape.shapes())):
        x, w, dy = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in shape.shapes())
        sizes = jax.ShapeDtypeStruct((shape.E,), jnp.int32)

        def both(x, w, sizes, dy):
            y, pullback = jax.vjp(lambda x, w: frugax.kernels.grouped_matmul(x, w, sizes), x, w)
            return y, pullback(dy)

        what = f"{shape.M} rows, {shape.E} experts [{shape.K}, {shape.N}]"
        program = lambda a, both=both: both(*a)  # noqa: E731
        rows.append(gpu.compiled(shape, program, (x, w, sizes, dy), what=what, prefix="grouped_matmul"))
    return rows


if __name__ == "__main__":
    gpu.main(__doc__, "grouped_matmul", SHAPES, measure, deviceless, TINY)
