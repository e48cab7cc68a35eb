"""Mamba's selective scan on one Hopper GPU, forward and forward + backward, against kernels that others use.

    python -m experiments.benchmarks.gpu_selective_scan                # on the chip
    python -m experiments.benchmarks.gpu_selective_scan --deviceless   # registers, spills, bytes: no chip

The call is a Mamba layer's: softplus of dt and its bias, the skip D and the gate z are part of it. The
contenders are measured against a copy of as many bytes; but N exponentials for each number of x take longer
than the bytes do (`exp2_ms`), so that a kernel which computes each of them can't reach the rate of a copy.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from frugax.kernels.common.chips import GPUS

from . import gpu

WORST_ERROR = 2**-7  # rmse over rms: one unit in the last place of bfloat16
H200 = GPUS["H200"]
H200_EXP2 = H200.processors * 16 * H200.clock  # a second: 16 a clock (CUDA's table of throughputs for 9.0)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of a Mamba layer with D inner channels and N states each; packed: some 16 documents."""

    B: int
    T: int
    D: int
    N: int = 16
    packed: bool = False

    def arrays(self) -> list[np.ndarray]:
        """x, dt, A, B, C, D, z, dt_bias and y's cotangent, the same at every call."""
        rng = np.random.default_rng(0)
        B, T, D, N = self.B, self.T, self.D, self.N

        def normal(*shape, dtype=jnp.bfloat16):
            return rng.standard_normal(shape, np.float32).astype(dtype)

        A = -np.tile(np.arange(1.0, N + 1, dtype=np.float32), (D, 1))  # Mamba's at its start
        # Steps of 0.001 to 0.1 after the softplus, as Mamba's are at its start.
        bias = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), D)))).astype(np.float32)
        tokens = [normal(B, T, D), normal(B, T, D)]
        columns = [normal(B, T, N), normal(B, T, N)]
        return [*tokens, A, *columns, normal(D, dtype=np.float32), normal(B, T, D), bias, normal(B, T, D)]

    def segment_ids(self) -> np.ndarray | None:
        starts = np.random.default_rng(1).random((self.B, self.T)) < 16 / self.T
        return np.cumsum(starts, axis=1).astype(np.int32) if self.packed else None


SHAPES = [
    Shape(8, 2048, 2048),
    Shape(8, 2048, 5120),
    Shape(32, 512, 1536),
    Shape(1, 16384, 5120),
    Shape(1, 16384, 5120, packed=True),
]
TINY = [Shape(1, 20, 128, N=4, packed=True)]


def frugax_scan(backend: str, shape: Shape) -> Callable[..., Any]:
    ids = shape.segment_ids()

    def scan(x, dt, A, B, C, D, z, dt_bias):
        return frugax.kernels.selective_scan(
            x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=True, segment_ids=ids, backend=backend
        )[0]

    return scan


def frugax_runner(backend: str, shape: Shape) -> gpu.Runner:
    return gpu.jax_runner(frugax_scan(backend, shape), shape.arrays())


def jla(shape: Shape) -> gpu.Runner:
    ops = importlib.import_module("jla.ops")
    ids = shape.segment_ids()

    def scan(x, dt, A, B, C, D, z, dt_bias):
        options = dict(dt=dt, a=A, d=D, z=z, dt_bias=dt_bias, dt_softplus=True, segment_ids=ids)
        return ops.linear_attention("mamba1", C, B, x, impl="mosaic_gpu", **options)[0]

    return gpu.jax_runner(scan, shape.arrays())


def mamba_ssm(shape: Shape) -> gpu.Runner:
    """The authors' CUDA kernel, its inputs laid out in memory as it wants them: time last."""
    if shape.packed:
        raise ValueError("it knows no documents")
    selective_scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def scan(x, dt, A, B, C, D, z, dt_bias):
        x, dt, B, C, z = (array.transpose(1, 2) for array in (x, dt, B, C, z))
        return selective_scan(x, dt, A, B, C, D, z, dt_bias, delta_softplus=True).transpose(1, 2)

    arrays = [
        np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if x.ndim == 3 else x for x in shape.arrays()
    ]
    return gpu.torch_runner(scan, arrays)


CONTENDERS: dict[str, Callable[[Shape], gpu.Runner]] = {
    "frugax pallas_gpu": partial(frugax_runner, "pallas_gpu"),
    "frugax xla": partial(frugax_runner, "xla"),
    "jax-linear-attention": jla,
    "mamba-ssm (CUDA)": mamba_ssm,
}


def stand_in(shape: Shape) -> Shape:
    return dataclasses.replace(shape, B=min(shape.B, 2), T=min(shape.T, 300), D=min(shape.D, 256))


def least_bytes(shape: Shape, passes: str) -> int:
    """Every input read once and every output written once; the backward pass reads the inputs again."""
    wide, columns = shape.B * shape.T * shape.D, shape.B * shape.T * shape.N
    forward = 2 * (4 * wide + 2 * columns)
    return forward if passes == "forward" else forward + 2 * (7 * wide + 4 * columns)


def kernel_bytes(shape: Shape) -> dict[str, int]:
    """Count the bytes that each kernel moves to and from device memory; shared ones come from the L2."""
    from frugax.kernels.selective_scan.pallas_gpu_blocks import CHANNELS
    from frugax.kernels.selective_scan.tiling import GPU_BACKWARD

    wide, columns = shape.B * shape.T * shape.D, 4 * 2 * shape.B * shape.T * shape.N
    states = 4 * wide * shape.N // GPU_BACKWARD
    return {
        "forward": 2 * 4 * wide + columns,
        "states": 2 * 2 * wide + columns + states,
        "backward": 2 * 7 * wide + columns + states + columns * shape.D // CHANNELS,
    }


# Each state of each token is multiplied by one exponential; the gradient walks its tiles there and back.
EXPONENTIALS = {"forward": 1, "states": 1, "backward": 2}


def measure(shapes: list[Shape], effort: gpu.Effort) -> Iterator[dict[str, Any]]:
    return gpu.measure(
        shapes,
        CONTENDERS,
        partial(frugax_scan, "reference"),
        stand_in=stand_in,
        bound=WORST_ERROR,
        least_bytes=least_bytes,
        effort=effort,
    )


def deviceless(shapes: list[Shape]) -> list[dict[str, Any]]:
    from frugax.kernels.selective_scan import pallas_gpu  # the kernels alone: no other backend is compiled
    from frugax.kernels.selective_scan.inputs import check

    rows = []
    # The kernels depend on N and on whether there are documents, and on nothing else.
    for shape in gpu.one_each(shapes, lambda shape: (shape.N, shape.packed)):
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shape.arrays()]
        x, dt, A, B, C, D, z, dt_bias, _ = arrays
        ids = jax.ShapeDtypeStruct((shape.B, shape.T), jnp.int32) if shape.packed else None
        call = jax.eval_shape(check, x, dt, A, B, C, D, z, dt_bias, None, ids)

        def both(call):
            *out, states = pallas_gpu.forward(call, True, keep_states=True, interpret=False)
            return out, pallas_gpu.backward(call, states, tuple(out), True, interpret=False)

        moved = kernel_bytes(shape)
        what = f"N = {shape.N}" + (", packed" if shape.packed else "")
        row = gpu.compiled(shape, both, call, what=what, prefix="selective_scan", kernel_bytes=moved)
        for passes, names in (("forward", ["forward"]), ("both", list(moved))):
            exponentials = sum(EXPONENTIALS[name] for name in names) * shape.B * shape.T * shape.D * shape.N
            row[passes] = {
                "bytes_over_least": round(sum(moved[name] for name in names) / least_bytes(shape, passes), 2),
                "bytes_ms": round(1e3 * sum(moved[name] for name in names) / H200.bandwidth, 4),
                "exp2_ms": round(1e3 * exponentials / H200_EXP2, 4),
            }
            print(passes, row[passes])
        rows.append(row)
    return rows


if __name__ == "__main__":
    gpu.main(__doc__, "selective_scan", SHAPES, measure, deviceless, TINY)
