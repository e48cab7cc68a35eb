"""Linear attention on one Hopper GPU, forward and forward + backward, against the kernels that others use.

    python -m experiments.benchmarks.gpu_linear_attention                # on the chip
    python -m experiments.benchmarks.gpu_linear_attention --deviceless   # registers, spills, bytes: no chip

On the chip every implementation that can be imported runs in this one process on the same random inputs, in
turns; one whose outputs or gradients differ from the float32 definition is reported as wrong and not timed.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RESULTS = Path(__file__).parent / "results"
H200_BANDWIDTH = 4.8e12  # bytes a second
WORST_ERROR = 2**-7  # rmse over rms: one unit in the last place of bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row of the table; the decay is one a head ("bth") or one a channel ("bthk")."""

    B: int
    T: int
    H: int
    D: int
    decay: str

    def arrays(self) -> list[np.ndarray]:
        """q, k, v, log-decays and the outputs' cotangent, float32, the same at every call."""
        rng = np.random.default_rng(0)
        size = (self.B, self.T, self.H, self.D)
        q, k, v, cotangent = (rng.standard_normal(size, np.float32) for _ in range(4))
        gate = rng.standard_normal(size if self.decay == "bthk" else size[:3], np.float32)
        return [q, k, v, -np.logaddexp(0, -gate) / 16, cotangent]


SHAPES = [
    Shape(B, T, H, D, decay)
    for decay in ("bth", "bthk")
    for B, T, H, D in (
        (1, 8192, 96, 128),
        (4, 2048, 16, 128),
        (8, 4096, 16, 64),
        (4, 8192, 8, 256),
        (1, 16384, 8, 128),
    )
]


def jax_runner(attend: Callable[..., Any], shape: Shape) -> dict[str, Callable[[], Any]]:
    """{"forward", "both"}: functions of no arguments that return when the chip is done."""
    *inputs, cotangent = (
        jnp.asarray(x, jnp.float32 if i == 3 else jnp.bfloat16) for i, x in enumerate(shape.arrays())
    )
    forward = jax.jit(attend)

    @jax.jit
    def both(cotangent, *inputs):
        out, pullback = jax.vjp(attend, *inputs)
        return out, pullback(cotangent)

    return {
        "forward": lambda: jax.block_until_ready(forward(*inputs)),
        "both": lambda: jax.block_until_ready(both(cotangent, *inputs)),
    }


def frugax_attend(backend: str) -> Callable[..., Any]:
    import frugax

    return lambda q, k, v, g: frugax.kernels.linear_attention(q, k, v, g, backend=backend)[0]


def jla_attend(shape: Shape) -> Callable[..., Any]:
    ops = importlib.import_module("jla.ops")
    kind = "gla" if shape.decay == "bthk" else "simple_gla"
    return lambda q, k, v, g: ops.linear_attention(kind, q, k, v, g=g, impl="mosaic_gpu")[0]


def fla_runner(shape: Shape) -> dict[str, Callable[[], Any]]:
    torch = importlib.import_module("torch")
    if shape.decay == "bthk":
        attend = importlib.import_module("fla.ops.gla").chunk_gla
    else:
        attend = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    *inputs, cotangent = (
        torch.tensor(x, device="cuda", dtype=torch.float32 if i == 3 else torch.bfloat16)
        for i, x in enumerate(shape.arrays())
    )
    needing = [x.clone().requires_grad_() for x in inputs]

    def forward():
        with torch.no_grad():
            out = attend(*inputs)[0]
        torch.cuda.synchronize()
        return out

    def both():
        out = attend(*needing)[0]
        gradients = torch.autograd.grad(out, needing, cotangent)
        torch.cuda.synchronize()
        return out, gradients

    return {"forward": forward, "both": both}


RUNNERS: dict[str, Callable[[Shape], dict[str, Callable[[], Any]]]] = {
    "frugax pallas_gpu": lambda shape: jax_runner(frugax_attend("pallas_gpu"), shape),
    "frugax xla": lambda shape: jax_runner(frugax_attend("xla"), shape),
    "jax-linear-attention": lambda shape: jax_runner(jla_attend(shape), shape),
    "flash-linear-attention": fla_runner,
}


def worst_error(result: Any, expected: Any) -> float:
    """The largest rmse / rms over outputs and gradients."""

    def numpy(x):
        return np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, np.float64)

    pairs = [(result[0], expected[0]), *zip(result[1], expected[1], strict=True)]
    wide = [(numpy(a), numpy(e)) for a, e in pairs]
    return max(float(np.sqrt(np.mean((a - e) ** 2) / np.mean(e**2))) for a, e in wide)


def stand_in(shape: Shape) -> Shape:
    """A call small enough for the token-by-token definition, with heads few or many as in `shape`."""
    many = shape.D <= 128 and shape.B * shape.H >= 64  # where our kernels choose another way
    return Shape(1, 300, 128 if many else 2, shape.D, shape.decay)


def gate(name: str, small: Shape) -> float:
    """The error of both passes."""
    *inputs, cotangent = (
        jnp.asarray(x, jnp.bfloat16 if i != 3 else jnp.float32) for i, x in enumerate(small.arrays())
    )
    wide = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        out, pullback = jax.vjp(frugax_attend("reference"), *wide)
        expected = out, pullback(cotangent.astype(jnp.float32))
    return worst_error(RUNNERS[name](small)["both"](), expected)


def milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measure(shapes: list[Shape], repeats: int) -> list[dict[str, Any]]:
    rows = []
    trusted: dict[Shape, dict[str, float | str]] = {}
    for small in dict.fromkeys(map(stand_in, shapes)):
        errors = trusted.setdefault(small, {})
        for name in RUNNERS:
            try:
                errors[name] = gate(name, small)
            except Exception as problem:  # not installed, or refuses the call
                errors[name] = f"{type(problem).__name__}: {problem}"[:200]
            print(f"gate {small} {name}: {errors[name]}", flush=True)
    for shape in shapes:
        errors = trusted[stand_in(shape)]
        runners = {}
        for name, error in errors.items():
            if isinstance(error, float) and error <= WORST_ERROR:
                try:
                    runners[name] = RUNNERS[name](shape)
                    for run in runners[name].values():
                        run()
                        run()
                except Exception as problem:  # out of memory, or refuses this size
                    runners.pop(name, None)
                    print(f"{shape} {name}: {type(problem).__name__}: {problem}"[:300], flush=True)
        for passes in ("forward", "both"):
            times: dict[str, list[float]] = {name: [] for name in runners}
            for _ in range(repeats):  # in turns, so that a drifting clock is the same for all
                for name, runner in runners.items():
                    times[name].append(milliseconds(runner[passes]))
            row = dataclasses.asdict(shape) | {
                "passes": passes,
                "median_ms": {name: round(statistics.median(t), 4) for name, t in times.items()},
                "quartiles_ms": {
                    name: [round(float(x), 4) for x in np.quantile(t, [0.25, 0.75])]
                    for name, t in times.items()
                },
                "errors": errors,
                "least_ms_by_bytes": round(1e3 * least_bytes(shape, passes) / H200_BANDWIDTH, 4),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def least_bytes(shape: Shape, passes: str) -> int:
    """Every input read once and every output written once; the backward pass reads the inputs again."""
    wide = shape.B * shape.T * shape.H * shape.D
    decay = 4 * (wide if shape.decay == "bthk" else wide // shape.D)
    forward = 2 * 4 * wide + decay
    return forward if passes == "forward" else forward + 2 * 7 * wide + 2 * decay


def kernel_bytes(shape: Shape) -> dict[str, int]:
    """What each kernel moves to and from device memory, if what programs share comes from the L2 cache."""
    wide = shape.B * shape.T * shape.H * shape.D
    per_channel = shape.decay == "bthk"
    decay, states = 4 * wide if per_channel else 0, 2 * wide * shape.D // 64
    return {
        "walk": 2 * 4 * wide,
        "walk_reverse": 2 * 4 * wide + states,
        "states": 2 * 2 * wide + decay + states,
        "outputs": 2 * 4 * wide + decay + states,
        "states_reverse": 2 * 2 * wide + decay + states,
        "outputs_reverse": 2 * 4 * wide + decay + states,
        "gradients": 2 * 6 * wide + 2 * decay + 2 * states,
    }


def deviceless(shapes: list[Shape]) -> list[dict[str, Any]]:
    from frugax.kernels.linear_attention import pallas_gpu  # the kernels alone: no other backend is compiled
    from frugax.kernels.linear_attention.inputs import check

    from .deviceless_gpu import kernels_for_h200, table

    rows = []
    for shape in shapes:
        x = jax.ShapeDtypeStruct((shape.B, shape.T, shape.H, shape.D), jnp.bfloat16)
        g = jax.ShapeDtypeStruct(x.shape if shape.decay == "bthk" else x.shape[:3], jnp.float32)
        call = jax.eval_shape(check, x, x, x, g, None, None, None)

        def both(call):
            out = pallas_gpu.forward(call, 0.1, interpret=False)
            return out, pallas_gpu.backward(call, out, 0.1, interpret=False)

        kernels = {}
        for kernel in kernels_for_h200(both, call):
            name = kernel.name.removeprefix("linear_attention_").rstrip("_0123456789")
            kernels[name] = dataclasses.replace(kernel, name=name)
        moved = kernel_bytes(shape)
        forward = moved["walk"] if "walk" in kernels else moved["states"] + moved["outputs"]
        again = moved["states"] if "outputs" in kernels else 0  # the backward pass recomputes them
        total = sum(moved[name] for name in kernels) + again
        row = dataclasses.asdict(shape) | {
            "kernels": [
                dataclasses.asdict(kernel) | {"bytes": moved[name]} for name, kernel in kernels.items()
            ],
            "forward_bytes_over_least": round(forward / least_bytes(shape, "forward"), 2),
            "both_bytes_over_least": round(total / least_bytes(shape, "both"), 2),
        }
        print(shape)
        print(table(list(kernels.values())))
        print({name: row[name] for name in row if name.endswith("over_least")}, flush=True)
        rows.append(row)
    return rows


PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-linear-attention",
    "flash-linear-attention",
    "torch",
    "triton",
)


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def why_not() -> str | None:
    """Why this process can't measure; None if it can."""
    if jax.default_backend() != "gpu":
        return f"this needs a Hopper GPU; jax runs on {jax.default_backend()} here (--deviceless needs none)"
    capability = jax.devices()[0].compute_capability
    return (
        None if float(capability) >= 9 else f"this needs a Hopper GPU; this one's capability is {capability}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deviceless", action="store_true", help="compile for H200 and report; run nothing")
    parser.add_argument("--repeats", type=int, default=30, help="timings of each implementation, default 30")
    parser.add_argument("--decay", choices=("bth", "bthk"), help="only this shape of decay")
    parser.add_argument(
        "--output", type=Path, help="where the JSON goes, default experiments/benchmarks/results"
    )
    options = parser.parse_args()
    shapes = [shape for shape in SHAPES if options.decay in (None, shape.decay)]
    if options.deviceless:
        # One of each head size, and one with few heads: the kernels depend on nothing else.
        shapes = list(
            {(shape.D, shape.B * shape.H < 16, shape.decay): shape for shape in reversed(shapes)}.values()
        )
        chip, rows = "H200 (compiled for, not run)", deviceless(shapes)
    else:
        if reason := why_not():
            sys.exit(reason)
        chip, rows = jax.devices()[0].device_kind, measure(shapes, options.repeats)
    name = "deviceless" if options.deviceless else "measured"
    path = options.output or RESULTS / f"gpu_linear_attention_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"chip": chip, "date": datetime.date.today().isoformat(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
