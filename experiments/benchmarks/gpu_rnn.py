"""Recurrent networks on Hopper: frugax against a lax.scan and cuDNN (torch), forward and forward + backward.

    python -m experiments.benchmarks.gpu_rnn                # on the chip
    python -m experiments.benchmarks.gpu_rnn --deviceless   # registers, spills, bytes: no chip

All of them map W x to h. cuDNN takes x and does the product with W itself: it gets W x for x and an identity
for W, and its time with that product is the one reported. It has one head, so it runs where H = 1 alone. What
differs from the float32 definition is reported as wrong and not timed.
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
from frugax.kernels.rnn.cells import CELLS

from . import gpu

WORST_ERROR = 2**-6  # rmse over rms: two units in the last place of bfloat16, which h is rounded to each step


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    D: int
    cell: str

    def arrays(self) -> list[np.ndarray]:
        """W x, R, h's cotangent, in bfloat16."""
        rng = np.random.default_rng(0)
        G = CELLS[self.cell].gates
        gates = rng.standard_normal((self.B, self.T, self.H, G, self.D), np.float32)
        recurrent = rng.standard_normal((self.H, G, self.D, self.D), np.float32) / self.D**0.5
        cotangent = rng.standard_normal((self.B, self.T, self.H, self.D), np.float32)
        return [x.astype(jnp.bfloat16) for x in (gates, recurrent, cotangent)]


SHAPES = [
    Shape(16, 1024, 1, 128, "lstm"),
    Shape(16, 1024, 1, 64, "lstm"),
    Shape(16, 1024, 12, 64, "lstm"),
    Shape(16, 1024, 8, 128, "lstm"),
    Shape(16, 1024, 8, 128, "gru"),
    Shape(16, 1024, 8, 128, "slstm"),
    Shape(64, 1024, 8, 128, "lstm"),
]
TINY = [Shape(2, 9, 1, 64, "gru")]


def frugax_rnn(backend: str, shape: Shape) -> Callable[..., Any]:
    return lambda gates, recurrent: frugax.kernels.rnn(gates, recurrent, cell=shape.cell, backend=backend)[0]


def plain_scan(shape: Shape) -> Callable[..., Any]:
    """The form that one writes by hand: JAX's own gradient of a scan."""
    cell = CELLS[shape.cell]

    def run(gates, recurrent):
        def step(state, x_BHGD):
            r_BHGD = jnp.einsum("bhi,hgio->bhgo", state[0].astype(gates.dtype), recurrent)
            pre = cell.combine(*(list(jnp.moveaxis(y.astype(jnp.float32), 2, 0)) for y in (x_BHGD, r_BHGD)))
            state = cell.step(pre, [state[s] for s in cell.reads])
            return state, state[0].astype(gates.dtype)

        zeros = jnp.zeros((shape.B, shape.H, shape.D))
        tokens = jnp.moveaxis(gates, 1, 0)
        return jnp.moveaxis(jax.lax.scan(step, (zeros,) * len(cell.states), tokens)[1], 0, 1)

    return run


def in_jax(make: Callable[[Shape], Callable[..., Any]], shape: Shape) -> gpu.Runner:
    return gpu.jax_runner(make(shape), shape.arrays())


def cudnn(shape: Shape) -> gpu.Runner:
    torch = importlib.import_module("torch")
    names = {"lstm": "LSTM", "gru": "GRU"}
    if shape.H != 1 or shape.cell not in names:
        raise ValueError("cuDNN has one head, and LSTM and GRU")
    B, T, D, G = shape.B, shape.T, shape.D, CELLS[shape.cell].gates
    gates, recurrent, cotangent = map(gpu.torch_tensor, shape.arrays())
    x = gates.reshape(B, T, G * D).requires_grad_()
    module = getattr(torch.nn, names[shape.cell])(
        G * D, D, bias=False, batch_first=True, device="cuda", dtype=torch.bfloat16
    )
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(G * D))
        module.weight_hh_l0.copy_(recurrent[0].transpose(1, 2).reshape(G * D, D))

    def forward():
        with torch.no_grad():
            return module(x)[0][:, :, None]

    def both():
        out = module(x)[0][:, :, None]
        dx, dR = torch.autograd.grad(out, [x, module.weight_hh_l0], cotangent)
        return out, (dx.reshape(B, T, 1, G, D), dR.reshape(1, G, D, D).transpose(2, 3))

    return gpu.Runner(forward, both, lambda _: torch.cuda.synchronize())


CONTENDERS: dict[str, Callable[[Shape], gpu.Runner]] = {
    "frugax pallas_gpu": partial(in_jax, partial(frugax_rnn, "pallas_gpu")),
    "frugax xla": partial(in_jax, partial(frugax_rnn, "xla")),
    "lax.scan": partial(in_jax, plain_scan),
    "cuDNN (torch)": cudnn,
}


def least_bytes(shape: Shape, passes: str) -> int:
    """W x and R read, h written; the gradient reads them again, with h's cotangent, and writes theirs."""
    h, G = shape.B * shape.T * shape.H * shape.D, CELLS[shape.cell].gates
    R = shape.H * G * shape.D**2
    forward = 2 * ((G + 1) * h + R)
    return forward if passes == "forward" else forward + 2 * ((2 * G + 2) * h + 2 * R)


def measure(shapes: list[Shape], effort: gpu.Effort) -> Iterator[dict[str, Any]]:
    return gpu.measure(
        shapes,
        CONTENDERS,
        partial(frugax_rnn, "reference"),
        stand_in=lambda shape: dataclasses.replace(shape, T=min(shape.T, 64)),
        bound=WORST_ERROR,
        least_bytes=least_bytes,
        effort=effort,
    )


def deviceless(shapes: list[Shape]) -> list[dict[str, Any]]:
    from frugax.kernels.rnn import pallas_gpu  # the kernels alone: no other backend is compiled
    from frugax.kernels.rnn.inputs import check

    rows = []
    for shape in shapes:
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shape.arrays()]
        call = jax.eval_shape(
            lambda g, R, cell=shape.cell: check(g, R, None, None, None, cell=cell), *arrays[:2]
        )

        def both(call):
            h, state, reads = pallas_gpu.forward(call, keep=True, interpret=False)
            return h, pallas_gpu.backward(call, h, reads, (h, state), interpret=False)

        what = f"{shape.cell}, D = {shape.D}, H = {shape.H}, B = {shape.B}"
        rows.append(gpu.compiled(shape, both, call, what=what, prefix="rnn_"))
    return rows


if __name__ == "__main__":
    gpu.main(__doc__, "rnn", SHAPES, measure, deviceless, TINY)
