"""Linear attention on one Hopper GPU, forward and forward + backward, against the kernels that others use.

    python -m experiments.benchmarks.gpu_linear_attention                # on the chip
    python -m experiments.benchmarks.gpu_linear_attention --deviceless   # registers, spills, bytes: no chip

On the chip every implementation that can be imported runs in this one process on the same random inputs, in
turns; one whose outputs or gradients differ from the float32 definition is reported as wrong and not timed.
Mamba-2's `ssd` is the same kernels by other names, with steps and rates to turn into decays around them.
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

from . import gpu

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
        """q, k, v, log-decays (float32) and the outputs' cotangent, the same at every call."""
        rng = np.random.default_rng(0)
        size = (self.B, self.T, self.H, self.D)
        q, k, v, cotangent = (rng.standard_normal(size, np.float32).astype(jnp.bfloat16) for _ in range(4))
        gate = rng.standard_normal(size if self.decay == "bthk" else size[:3], np.float32)
        return [q, k, v, -np.logaddexp(0, -gate) / 16, cotangent]

    @property
    def wide(self) -> int:
        return self.B * self.T * self.H * self.D


@dataclasses.dataclass(frozen=True)
class SSD:
    """A batch of a Mamba-2 layer: H heads of P channels and N states each, B and C the same for all heads."""

    B: int
    T: int
    H: int
    P: int
    N: int

    def arrays(self) -> list[np.ndarray]:
        """x, dt, A (float32), B, C and y's cotangent; dt before its softplus."""
        rng = np.random.default_rng(0)
        B, T, H = self.B, self.T, self.H

        def normal(*shape):
            return rng.standard_normal(shape, np.float32).astype(jnp.bfloat16)

        x, dt = normal(B, T, H, self.P), normal(B, T, H) - jnp.bfloat16(4)
        A = -rng.uniform(1, 16, H).astype(np.float32)  # Mamba-2's at its start
        return [x, dt, A, normal(B, T, 1, self.N), normal(B, T, 1, self.N), normal(B, T, H, self.P)]


@dataclasses.dataclass(frozen=True)
class Taylor:
    """A batch of Based's linear layer: H heads of K channels, features of their Taylor map, and V values."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def arrays(self) -> list[np.ndarray]:
        """q and k (over K^(1/4)), v and the outputs' cotangent, the same at every call."""
        rng = np.random.default_rng(0)
        sizes = (self.K, self.K, self.V, self.V)
        drawn = [rng.standard_normal((self.B, self.T, self.H, size), np.float32) for size in sizes]
        drawn[:2] = (x * self.K**-0.25 for x in drawn[:2])
        return [x.astype(jnp.bfloat16) for x in drawn]


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
SSD_SHAPES = [SSD(8, 2048, 64, 64, 128), SSD(4, 4096, 80, 64, 128), SSD(1, 16384, 24, 64, 128)]
TAYLOR_SHAPES = [Taylor(8, 2048, 16, 16, 65), Taylor(1, 16384, 16, 16, 65)]
TINY = [Shape(1, 70, 2, 64, "bth"), SSD(1, 70, 2, 32, 64), Taylor(1, 70, 1, 5, 24)]


def frugax_attend(backend: str, shape: Shape) -> Callable[..., Any]:
    return lambda q, k, v, g: frugax.kernels.linear_attention(q, k, v, g, backend=backend)[0]


def frugax_ssd(backend: str, shape: SSD) -> Callable[..., Any]:
    return lambda x, dt, A, B, C: frugax.kernels.ssd(x, dt, A, B, C, dt_softplus=True, backend=backend)[0]


def frugax_taylor(backend: str | None, shape: Taylor) -> Callable[..., Any]:
    options = dict(feature_map="taylor", scale=1.0, backend=backend)
    return lambda q, k, v: frugax.kernels.linear_attention(q, k, v, **options)[0]


def features_in_memory(shape: Taylor) -> Callable[..., Any]:
    """The kernels for q and k as they are, of features that XLA makes."""

    def attend(q, k, v):
        q, k = (frugax.layers.taylor(x) for x in (q, k))
        return frugax.kernels.linear_attention(q, k, v, scale=1.0)[0]

    return attend


def in_jax(make: Callable[[Any], Callable[..., Any]], shape: Any) -> gpu.Runner:
    return gpu.jax_runner(make(shape), shape.arrays())


def jla(shape: Shape) -> gpu.Runner:
    ops = importlib.import_module("jla.ops")
    kind = "gla" if shape.decay == "bthk" else "simple_gla"

    def attend(q, k, v, g):
        return ops.linear_attention(kind, q, k, v, g=g, impl="mosaic_gpu")[0]

    return gpu.jax_runner(attend, shape.arrays())


def jla_ssd(shape: SSD) -> gpu.Runner:
    ops = importlib.import_module("jla.ops")

    def ssd(x, dt, A, B, C):
        dt = jax.nn.softplus(dt.astype(jnp.float32))
        q, k = (jnp.broadcast_to(y, (*x.shape[:3], shape.N)) for y in (C, B))
        v, options = (x * dt[..., None]).astype(x.dtype), dict(scale=1.0, impl="mosaic_gpu")
        return ops.linear_attention("simple_gla", q, k, v, g=dt * A, **options)[0]

    return gpu.jax_runner(ssd, shape.arrays())


def fla(shape: Shape) -> gpu.Runner:
    if shape.decay == "bthk":
        attend = importlib.import_module("fla.ops.gla").chunk_gla
    else:
        attend = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    return gpu.torch_runner(lambda *inputs: attend(*inputs)[0], shape.arrays())


def fla_ssd(shape: SSD) -> gpu.Runner:
    softplus = importlib.import_module("torch.nn.functional").softplus
    attend = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def ssd(x, dt, A, B, C):
        dt = softplus(dt.float())
        q, k = (y.expand(-1, -1, shape.H, -1) for y in (C, B))
        return attend(q, k, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)[0]

    return gpu.torch_runner(ssd, shape.arrays())


def mamba_ssm(shape: SSD) -> gpu.Runner:
    """The authors' Triton kernels, with the chunks of their layer."""
    ssd = gpu.without_init("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return gpu.torch_runner(
        lambda x, dt, A, B, C: ssd(x, dt, A, B, C, chunk_size=256, dt_softplus=True), shape.arrays()
    )


CONTENDERS: dict[str, Callable[[Shape], gpu.Runner]] = {
    "frugax pallas_gpu": partial(in_jax, partial(frugax_attend, "pallas_gpu")),
    "frugax xla": partial(in_jax, partial(frugax_attend, "xla")),
    "jax-linear-attention": jla,
    "flash-linear-attention": fla,
}
SSD_CONTENDERS: dict[str, Callable[[SSD], gpu.Runner]] = {
    "frugax pallas_gpu": partial(in_jax, partial(frugax_ssd, "pallas_gpu")),
    "frugax xla": partial(in_jax, partial(frugax_ssd, "xla")),
    "jax-linear-attention": jla_ssd,
    "flash-linear-attention": fla_ssd,
    "mamba-ssm (Triton)": mamba_ssm,
}

TAYLOR_CONTENDERS: dict[str, Callable[[Taylor], gpu.Runner]] = {
    "frugax pallas_gpu": partial(in_jax, partial(frugax_taylor, "pallas_gpu")),
    "frugax xla": partial(in_jax, partial(frugax_taylor, "xla")),
    "features in memory, frugax": partial(in_jax, features_in_memory),
}


def stand_in(shape: Shape) -> Shape:
    """A call small enough for the token-by-token definition, with heads few or many as in `shape`."""
    many = shape.D <= 128 and shape.B * shape.H >= 64  # where our kernels choose another way
    return Shape(1, min(shape.T, 300), 128 if many else 2, shape.D, shape.decay)


def ssd_stand_in(shape: SSD) -> SSD:
    from frugax.kernels.common.chips import PROCESSORS

    return SSD(1, min(shape.T, 300), 128 if shape.B * shape.H >= PROCESSORS else 2, shape.P, shape.N)


def taylor_stand_in(shape: Taylor) -> Taylor:
    return dataclasses.replace(shape, B=1, T=min(shape.T, 300), H=2)


def least_bytes(shape: Shape, passes: str) -> int:
    """Every input read once and every output written once; the backward pass reads the inputs again."""
    decay = 4 * (shape.wide if shape.decay == "bthk" else shape.wide // shape.D)
    forward = 2 * 4 * shape.wide + decay
    return forward if passes == "forward" else forward + 2 * 7 * shape.wide + 2 * decay


def ssd_least_bytes(shape: SSD, passes: str) -> int:
    tokens = shape.B * shape.T
    x, dt, columns = tokens * shape.H * shape.P, tokens * shape.H, 2 * tokens * shape.N
    forward = 2 * (2 * x + dt + columns)
    return forward if passes == "forward" else forward + 2 * (3 * x + 2 * dt + 2 * columns)


def taylor_least_bytes(shape: Taylor, passes: str) -> int:
    keys, values = (shape.B * shape.T * shape.H * size for size in (shape.K, shape.V))
    forward = 2 * (2 * keys + 2 * values)
    return forward if passes == "forward" else forward + 2 * (4 * keys + 3 * values)


def kernel_bytes(shape: Shape) -> dict[str, int]:
    """Count the bytes that each kernel moves to and from device memory; shared ones come from the L2."""
    wide = shape.wide
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


def measure(shapes: list[Any], effort: gpu.Effort) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = dict(bound=WORST_ERROR, effort=effort)
    yield from gpu.measure(
        [shape for shape in shapes if isinstance(shape, Shape)],
        CONTENDERS,
        partial(frugax_attend, "reference"),
        stand_in=stand_in,
        least_bytes=least_bytes,
        **options,
    )
    yield from gpu.measure(
        [shape for shape in shapes if isinstance(shape, SSD)],
        SSD_CONTENDERS,
        partial(frugax_ssd, "reference"),
        stand_in=ssd_stand_in,
        least_bytes=ssd_least_bytes,
        **options,
    )
    yield from gpu.measure(
        [shape for shape in shapes if isinstance(shape, Taylor)],
        TAYLOR_CONTENDERS,
        partial(frugax_taylor, "reference"),
        stand_in=taylor_stand_in,
        least_bytes=taylor_least_bytes,
        **options,
    )


def both(call):
    """The kernels alone: no other backend is compiled."""
    from frugax.kernels.linear_attention import pallas_gpu

    out = pallas_gpu.forward(call, 0.1, interpret=False)
    return out, pallas_gpu.backward(call, out, 0.1, interpret=False)


def deviceless(shapes: list[Any]) -> list[dict[str, Any]]:
    from frugax.kernels.linear_attention.inputs import check

    def call_of(q, k, v, g):
        bf16, f32 = jnp.bfloat16, jnp.float32
        structs = [jax.ShapeDtypeStruct(x, d) for x, d in ((q, bf16), (k, bf16), (v, bf16), (g, f32))]
        return jax.eval_shape(check, *structs, None, None, None)

    rows = []
    # One of each head size, and one with few heads: the kernels depend on nothing else.
    plain = [shape for shape in shapes if isinstance(shape, Shape)]
    for shape in gpu.one_each(plain, lambda shape: (shape.D, shape.B * shape.H < 16, shape.decay)):
        x = (shape.B, shape.T, shape.H, shape.D)
        call = call_of(x, x, x, x if shape.decay == "bthk" else x[:3])
        moved = kernel_bytes(shape)
        what = f"{shape.decay}, K = V = {shape.D}, {shape.B * shape.H} heads"
        row = gpu.compiled(shape, both, call, what=what, prefix="linear_attention_", kernel_bytes=moved)
        kernels = [kernel["name"] for kernel in row["kernels"]]
        forward = moved["walk"] if "walk" in kernels else moved["states"] + moved["outputs"]
        again = moved["states"] if "outputs" in kernels else 0  # the backward pass recomputes them
        total = sum(moved[name] for name in kernels) + again
        row["forward_bytes_over_least"] = round(forward / least_bytes(shape, "forward"), 2)
        row["both_bytes_over_least"] = round(total / least_bytes(shape, "both"), 2)
        print({name: row[name] for name in row if name.endswith("over_least")}, flush=True)
        rows.append(row)
    mamba2 = [shape for shape in shapes if isinstance(shape, SSD)]
    for ssd in gpu.one_each(mamba2, ssd_stand_in):
        heads, columns = (ssd.B, ssd.T, ssd.H), (ssd.B, ssd.T, 1, ssd.N)
        call = call_of(columns, columns, (*heads, ssd.P), heads)
        what = f"ssd, N = {ssd.N}, P = {ssd.P}, {ssd.B * ssd.H} heads"
        rows.append(gpu.compiled(ssd, both, call, what=what, prefix="linear_attention_"))
    based = [shape for shape in shapes if isinstance(shape, Taylor)]
    for taylor in gpu.one_each(based, taylor_stand_in):
        rows.append(taylor_compiled(taylor))
    return rows


def taylor_compiled(shape: Taylor) -> dict[str, Any]:
    """The kernels of Taylor features, and the memory that both passes take besides inputs and results."""
    from .deviceless_gpu import compile_for_h200

    ways = {
        "kernel": frugax_taylor(None, shape),
        "xla": frugax_taylor("xla", shape),
        "features in memory": features_in_memory(shape),
    }
    *inputs, cotangent = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shape.arrays())

    def both(attend, arguments):
        *inputs, cotangent = arguments
        out, pullback = jax.vjp(attend, *inputs)
        return out, pullback(cotangent)

    what = f"Taylor features, K = {shape.K}, V = {shape.V}, {shape.B * shape.H} heads"
    arguments = (*inputs, cotangent)
    row = gpu.compiled(shape, partial(both, ways["kernel"]), arguments, what=what, prefix="linear_attention_")
    programs = {name: compile_for_h200(partial(both, attend), arguments) for name, attend in ways.items()}
    sizes = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    row["temporary_MB"] = {name: round(size / 1e6, 1) for name, size in sizes.items()}
    print(row["temporary_MB"], flush=True)
    return row


if __name__ == "__main__":
    gpu.main(__doc__, "linear_attention", [*SHAPES, *SSD_SHAPES, *TAYLOR_SHAPES], measure, deviceless, TINY)
