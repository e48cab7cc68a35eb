"""Products with weights in few bits on a Hopper GPU, beside bfloat16 ones and what a copy of the bytes takes.

  python -m experiments.benchmarks.gpu_quantized_matmul
  python -m experiments.benchmarks.gpu_quantized_matmul --deviceless     compile for H200; needs no GPU

One program multiplies the same tokens by many weights in turn, which no cache holds together. The kernel
must agree with the definition on fewer columns; then it is timed by turns with plain JAX, and with bfloat16
weights, which the vendor's library multiplies.
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

BOUND = 2.0**-7  # bfloat16's epsilon
CACHE = 2**28  # bytes of weights that a program goes through: several times a GPU's cache


@dataclasses.dataclass(frozen=True)
class Product:
    """M tokens by weights [K, N]."""

    format: str
    M: int
    K: int
    N: int
    group_size: int | None = 128
    activations: str | None = None

    def arrays(self, count: int = 1) -> tuple[jax.Array, list[Any]]:
        """(tokens, as many weights)"""
        key_x, *keys = jax.random.split(jax.random.key(0), count + 1)
        quantize = jax.jit(
            lambda key: frugax.formats.quantize(
                jax.random.normal(key, (self.K, self.N)), self.format, group_size=self.group_size
            )
        )
        return jax.random.normal(key_x, (self.M, self.K), jnp.bfloat16), [quantize(key) for key in keys]

    def product(self, x: jax.Array, w: Any, backend: str | None = None) -> jax.Array:
        """Return x W."""
        return frugax.kernels.quantized_matmul(x, w, activations=self.activations, backend=backend)


SHAPES = [Product("int4", M, n, n) for n in (4096, 8192) for M in (1, 8, 16, 64, 256)]
SHAPES += [
    Product("int8", 4096, 4096, 4096, None, "int8"),
    Product("int4", 4096, 4096, 4096),
    Product("int4", 4096, 4096, 4096, 128, "int8"),
    *(Product(format, 16, 4096, 4096, None) for format in ("nf4", "mxfp4", "nvfp4")),
    *(Product(format, 16, 4096, 4096) for format in ("int2", "int3", "int8", "uint4")),
]
TINY = [Product("int4", 3, 256, 128), Product("int8", 3, 256, 128, None, "int8")]


def agrees(shape: Product) -> float:
    """Return the kernel's error on fewer columns and rows."""
    small = dataclasses.replace(shape, M=min(shape.M, 128), K=min(shape.K, 1024), N=min(shape.N, 256))
    x, (w,) = small.arrays()
    outputs = (jax.jit(partial(small.product, backend=b))(x, w) for b in ("pallas_gpu", "reference"))
    return worst_error(*(y.astype(jnp.float32) for y in outputs))


def measure(shapes: list[Product], effort: gpu.Effort) -> Iterator[dict[str, Any]]:
    """Yield median times of one product: the kernel's, plain JAX's and bfloat16's; their share of a copy."""
    rate = gpu.copy_rate()
    for shape in shapes:
        error = agrees(shape)
        row = dataclasses.asdict(shape) | {"error": error}
        if not error < BOUND:  # no time of a wrong answer is worth reporting
            yield row | {"median_ms": {}}
            continue
        on_chip = jax.default_backend() == "gpu"
        packed = jax.eval_shape(lambda shape=shape: shape.arrays()[1])[0].nbytes
        dense = 2 * shape.K * shape.N
        times: dict[str, list[float]] = {"pallas_gpu": [], "xla": [], "bfloat16": []}
        programs = {}
        for name in times:
            nbytes = dense if name == "bfloat16" else packed
            count = min(64, -(-CACHE // nbytes)) if on_chip else 1
            x, weights = shape.arrays(count)
            if name == "bfloat16":
                weights = [w.dequantize(jnp.bfloat16) for w in weights]
                multiply: Any = jnp.dot
            else:
                multiply = partial(shape.product, backend=name)
            run: Any = jax.jit(lambda x, weights, f=multiply: [f(x, w) for w in weights])
            jax.block_until_ready(run(x, weights))
            programs[name] = partial(run, x, weights), count
        for _ in range(effort.repeats):
            for name, (run, count) in programs.items():
                times[name].append(gpu.milliseconds(run, jax.block_until_ready) / count)
        medians = {name: statistics.median(t) for name, t in times.items()}
        least = packed + 2 * shape.M * (shape.K + shape.N)  # bytes to read and to write
        operations = 2 * shape.M * shape.K * shape.N
        yield row | {
            "median_ms": {name: round(t, 5) for name, t in medians.items()},
            "times_bfloat16": round(medians["bfloat16"] / medians["pallas_gpu"], 2),
            "share_of_copy": round(1e3 * least / rate / medians["pallas_gpu"], 3),
            "tera_operations_a_second": round(operations / medians["pallas_gpu"] / 1e9, 1),
            "copy_gb_a_second": round(rate / 1e9),
        }


def deviceless(shapes: list[Product]) -> list[dict[str, Any]]:
    """Registers and spills of each compiled kernel."""
    rows = []
    for shape in shapes:
        x, (w,) = jax.eval_shape(shape.arrays)
        what = f"{shape.format}, M={shape.M}, {shape.K} x {shape.N}"
        program = lambda a, shape=shape: shape.product(*a)  # noqa: E731
        rows.append(gpu.compiled(shape, program, (x, w), what=what, prefix="quantized_matmul"))
    return rows


if __name__ == "__main__":
    gpu.main(__doc__, "quantized_matmul", SHAPES, measure, deviceless, TINY)
