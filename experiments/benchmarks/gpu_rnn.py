"""Recurrent networks on Hopper: frugax against a lax.scan and cuDNN (torch), forward and forward + backward.

    python -m experiments.benchmarks.gpu_rnn                # on the chip
    python -m experiments.benchmarks.gpu_rnn --deviceless   # registers, spills, bytes: no chip

All of them map W x to h. cuDNN takes x and does the product with W itself: it gets W x for x and an identity
for W, and its time with that product is the one reported. It has one head, so it runs where H = 1 alone. What
differs from the float32 definition is reported as wrong and not timed.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from frugax.kernels.rnn.cells import CELLS

from .gpu_linear_attention import milliseconds, versions, why_not, worst_error

RESULTS = Path(__file__).parent / "results"
WORST_ERROR = 2**-6  # rmse over rms: two units in the last place of bfloat16, which h is rounded to each step


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    D: int
    cell: str

    def arrays(self) -> list[np.ndarray]:
        """W x, R, h's cotangent."""
        rng = np.random.default_rng(0)
        G = CELLS[self.cell].gates
        gates = rng.standard_normal((self.B, self.T, self.H, G, self.D), np.float32)
        recurrent = rng.standard_normal((self.H, G, self.D, self.D), np.float32) / self.D**0.5
        return [gates, recurrent, rng.standard_normal((self.B, self.T, self.H, self.D), np.float32)]


SHAPES = [
    Shape(16, 1024, 1, 128, "lstm"),
    Shape(16, 1024, 1, 64, "lstm"),
    Shape(16, 1024, 12, 64, "lstm"),
    Shape(16, 1024, 8, 128, "lstm"),
    Shape(16, 1024, 8, 128, "gru"),
    Shape(16, 1024, 8, 128, "slstm"),
    Shape(64, 1024, 8, 128, "lstm"),
]


def frugax_rnn(backend: str | None) -> Callable[[Shape], Callable[..., Any]]:
    return lambda shape: (
        lambda gates, recurrent: frugax.kernels.rnn(gates, recurrent, cell=shape.cell, backend=backend)[0]
    )


def plain_scan(shape: Shape) -> Callable[..., Any]:
    """What one writes by hand: JAX's own gradient of a scan."""
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


def in_jax(make: Callable[[Shape], Callable[..., Any]]) -> Callable[[Shape], dict[str, Callable[[], Any]]]:
    def runner(shape: Shape) -> dict[str, Callable[[], Any]]:
        *inputs, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in shape.arrays())
        f = make(shape)
        forward = jax.jit(f)

        @jax.jit
        def both(cotangent, *inputs):
            out, pullback = jax.vjp(f, *inputs)
            return out, pullback(cotangent)

        return {
            "forward": lambda: jax.block_until_ready(forward(*inputs)),
            "both": lambda: jax.block_until_ready(both(cotangent, *inputs)),
        }

    return runner


def cudnn(shape: Shape) -> dict[str, Callable[[], Any]]:
    torch = importlib.import_module("torch")
    names = {"lstm": "LSTM", "gru": "GRU"}
    if shape.H != 1 or shape.cell not in names:
        raise ValueError("cuDNN has one head, and LSTM and GRU")
    B, T, D, G = shape.B, shape.T, shape.D, CELLS[shape.cell].gates
    gates, recurrent, cotangent = (
        torch.tensor(x, device="cuda", dtype=torch.bfloat16) for x in shape.arrays()
    )
    x = gates.reshape(B, T, G * D).requires_grad_()
    module = getattr(torch.nn, names[shape.cell])(
        G * D, D, bias=False, batch_first=True, device="cuda", dtype=torch.bfloat16
    )
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(G * D))
        module.weight_hh_l0.copy_(recurrent[0].transpose(1, 2).reshape(G * D, D))

    def forward():
        with torch.no_grad():
            out = module(x)[0]
        torch.cuda.synchronize()
        return out[:, :, None]

    def both():
        out = module(x)[0][:, :, None]
        dx, dR = torch.autograd.grad(out, [x, module.weight_hh_l0], cotangent)
        torch.cuda.synchronize()
        return out, (dx.reshape(B, T, 1, G, D), dR.reshape(1, G, D, D).transpose(2, 3))

    return {"forward": forward, "both": both}


RUNNERS: dict[str, Callable[[Shape], dict[str, Callable[[], Any]]]] = {
    "frugax pallas_gpu": in_jax(frugax_rnn("pallas_gpu")),
    "frugax xla": in_jax(frugax_rnn("xla")),
    "lax.scan": in_jax(plain_scan),
    "cuDNN (torch)": cudnn,
}


def gate(name: str, small: Shape) -> float:
    """The error of both passes."""
    *wide, cotangent = (jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in small.arrays())
    with jax.default_matmul_precision("highest"):
        out, pullback = jax.vjp(frugax_rnn("reference")(small), *wide)
        expected = out, pullback(cotangent)
    return worst_error(RUNNERS[name](small)["both"](), expected)


def measure(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        runners: dict[str, Any] = {}
        errors: dict[str, Any] = {}  # how far off, or why not at all
        for name, make in RUNNERS.items():
            try:
                errors[name] = gate(name, dataclasses.replace(shape, T=64))
                if errors[name] <= WORST_ERROR:
                    runners[name] = make(shape)
                    for run in runners[name].values():
                        run()
                        run()
            except Exception as problem:  # not installed, or refuses the call
                runners.pop(name, None)
                errors[name] = f"{type(problem).__name__}: {problem}"[:200]
        for passes in ("forward", "both"):
            times: dict[str, list[float]] = {name: [] for name in runners}
            for _ in range(repeats):  # in turns, so that a drifting clock is the same for all
                for name, runner in runners.items():
                    times[name].append(milliseconds(runner[passes]))
            row = dataclasses.asdict(shape) | {
                "passes": passes,
                "median_ms": {name: round(statistics.median(t), 4) for name, t in times.items()},
                "errors": errors,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def deviceless() -> list[dict[str, Any]]:
    from frugax.kernels.rnn import pallas_gpu  # the kernels alone: no other backend is compiled
    from frugax.kernels.rnn.inputs import check

    from .deviceless_gpu import kernels_for_h200, table

    rows = []
    for shape in SHAPES:
        arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in shape.arrays()]
        call = jax.eval_shape(
            lambda g, R, cell=shape.cell: check(g, R, None, None, None, cell=cell), *arrays[:2]
        )

        def both(call):
            h, state, reads = pallas_gpu.forward(call, keep=True, interpret=False)
            return h, pallas_gpu.backward(call, h, reads, (h, state), interpret=False)

        kernels = kernels_for_h200(both, call)  # none where an earlier shape had the same
        print(shape, table(kernels), sep="\n", flush=True)
        rows.append(dataclasses.asdict(shape) | {"kernels": [dataclasses.asdict(k) for k in kernels]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deviceless", action="store_true", help="compile for H200 and report; run nothing")
    parser.add_argument("--repeats", type=int, default=30, help="timings of each implementation, default 30")
    options = parser.parse_args()
    if options.deviceless:
        chip, rows = "H200 (compiled for, not run)", deviceless()
    else:
        if reason := why_not():
            raise SystemExit(reason)
        chip, rows = jax.devices()[0].device_kind, measure(options.repeats)
    path = RESULTS / f"gpu_rnn_{'deviceless' if options.deviceless else 'measured'}.json"
    record = {"chip": chip, "date": datetime.date.today().isoformat(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
