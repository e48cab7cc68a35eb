"""Calls of quantized_matmul: how one is drawn, and which each backend has to get right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import frugax
from frugax.kernels import MixedActivations


def draw(rng, format, K, N, group=None, B=2, T=None, bias=False, dtype="float32", **more):
    """Tokens [B, K] or [B, T, K] of different sizes, one channel of which is large, and packed weights."""
    shape = (B, K) if T is None else (B, T, K)
    x = rng.standard_normal(shape) * 2 ** rng.uniform(-2, 2, (*shape[:-1], 1))
    x[..., 0] *= 8
    quantize = jax.jit(partial(frugax.formats.quantize, format=format, group_size=group))
    w = quantize(jnp.asarray(rng.standard_normal((K, N)), jnp.float32))
    args = {"x": x.astype(jnp.dtype(dtype)), "w": w}
    if bias:
        args["bias"] = rng.standard_normal(N).astype(jnp.dtype(dtype))
    return args | more


MIXED = MixedActivations(1, block=32)
PLAIN = [
    {"format": "int4", "B": 1, "K": 1, "N": 1},
    {"format": "int4", "B": 3, "K": 300, "N": 20, "group": 100, "bias": True},
    {"format": "int3", "B": 1, "K": 96, "N": 33, "group": 32},
    {"format": "uint4", "B": 1, "T": 5, "K": 128, "N": 24, "group": 64, "bias": True},
    {"format": "int8", "B": 1, "K": 70, "N": 130, "dtype": "bfloat16", "bias": True},
    {"format": "ternary", "B": 2, "K": 64, "N": 16},
    {"format": "nf4_dq", "B": 2, "K": 128, "N": 300},
    {"format": "nvfp4", "B": 2, "K": 64, "N": 24},
    {"format": "mxfp6", "B": 2, "K": 72, "N": 24, "dtype": "float16"},
    {"format": "bipolar5", "B": 2, "K": 50, "N": 24, "group": 30},
]
ROUNDED = [
    {"format": "int8", "B": 3, "K": 96, "N": 24, "group": 32, "bias": True, "activations": "int8"},
    {"format": "int4", "B": 3, "K": 300, "N": 24, "group": 100, "activations": "int8"},
    {"format": "uint4", "B": 3, "K": 64, "N": 24, "group": 16, "activations": MIXED},
    {"format": "int4", "B": 3, "K": 128, "N": 24, "group": 64, "activations": MIXED, "dtype": "bfloat16"},
    {"format": "fp8_e4m3", "B": 3, "K": 128, "N": 24, "group": 64, "activations": "fp8_e4m3"},
    {"format": "mxfp4", "B": 3, "K": 72, "N": 24, "activations": "mxfp8"},
]
BY_BITS = [
    {
        "format": "bipolar6",
        "B": 3,
        "K": 100,
        "N": 24,
        "group": 50,
        "activations": "bipolar6",
        "method": "planes",
    },
    {"format": "int3", "B": 3, "K": 70, "N": 24, "group": 35, "method": "lut"},
    {"format": "uint2", "B": 3, "K": 64, "N": 24, "activations": "int8", "method": "lut"},
]
FLOAT64 = [case | {"dtype": "float64"} for case in (*PLAIN[1:4], *ROUNDED[:3], BY_BITS[1])]
ON_TPU = [
    {"format": "int4", "B": 3, "K": 300, "N": 130, "group": 100, "bias": True},
    {"format": "int8", "B": 5, "K": 256, "N": 256, "group": 128, "activations": "int8", "bias": True},
    {"format": "nf4", "B": 1, "K": 256, "N": 128, "dtype": "bfloat16"},
    {"format": "uint3", "B": 2, "K": 256, "N": 128, "group": 64},
    {"format": "nvfp4", "B": 2, "T": 4, "K": 256, "N": 128, "dtype": "bfloat16"},
    {"format": "int4", "B": 3, "K": 256, "N": 128, "group": 128, "activations": MixedActivations(1)},
]
ON_GPU = [
    {"format": "int4", "B": 1, "K": 256, "N": 256, "group": 128, "dtype": "bfloat16", "bias": True},
    {"format": "nf4", "B": 17, "K": 256, "N": 256, "dtype": "bfloat16"},
]
CASES = {
    "reference": FLOAT64,
    "xla": [*PLAIN, *ROUNDED, *BY_BITS, *FLOAT64],
    "pallas_tpu": ON_TPU,
    "pallas_gpu": ON_GPU,
    None: [PLAIN[1], ROUNDED[0]],
}


def has(case: dict) -> set:
    """Return what backends have code of their own for."""
    given = {"dtype": "float32", "activations": None, "method": None} | case
    names = {f"{name} {given[name]}" for name in ("format", "dtype", "activations", "method")}
    short = "short group" if case["K"] % (case.get("group") or case["K"]) else "whole groups"
    return names | {short, "one token" if case["B"] == 1 else "tokens", f"bias {bool(case.get('bias'))}"}


def shaped(format, K=64, N=24, group=None, B=2):
    """Return a call with shapes in the place of weights: importing this computes nothing."""
    quantize = partial(frugax.formats.quantize, format=format, group_size=group)
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((K, N), jnp.float32))
    return {"x": np.zeros((B, K), np.float32), "w": w}


GOOD = shaped("int4", group=32)
LAST = jax.eval_shape(partial(frugax.formats.quantize, format="int4", axis=1), jnp.zeros((64, 24)))
STACK = jax.eval_shape(partial(frugax.formats.quantize, format="int4", axis=1), jnp.zeros((2, 64, 24)))
WRONG = [
    ({"w": jnp.ones((64, 24))}, "w: got .*; expected a QuantizedTensor"),
    ({"w": LAST}, r"w: got int4\[64, 24\] in groups along axis -1; expected \[K, N\] in groups along axis 0"),
    ({"w": STACK}, r"w: got int4\[2, 64, 24\]"),
    ({"x": np.zeros((2, 63), np.float32)}, r"x: got float32\[2, 63\]; expected \[..., 64\] for w \[64, 24\]"),
    ({"x": np.zeros((2, 64), np.int32)}, "x: got int32.*; expected a floating dtype"),
    ({"x": np.zeros((0, 64), np.float32)}, "x: got .*; expected every size >= 1"),
    ({"bias": np.zeros(23, np.float32)}, r"bias: got float32\[23\]; expected floats \[24\]"),
    ({"activations": "int9"}, "format: got 'int9'"),
    (
        {"activations": "nvfp4"},
        "activations: got nvfp4; expected a format in which each token has its own scale",
    ),
    (
        {"activations": MixedActivations(1, block=48)},
        "activations: got blocks of 48 channels; expected a multiple",
    ),
    (
        {"activations": MixedActivations(3, block=32)},
        "activations: got high_blocks=3; expected 0 to 2 for K=64",
    ),
    ({"method": "planes"}, "method: got 'planes' with w int4; expected bipolar"),
    (shaped("nf4") | {"method": "lut"}, "method: got 'lut' for w nf4; expected integers or bipolar"),
    ({"method": "table"}, "method: got 'table'; expected 'dot', 'planes'"),
]
REFUSED = [
    ("pallas_tpu", {"method": "lut"}, "'lut'"),
    ("pallas_gpu", {}, "not float32"),
]
COMPILED = [
    {"format": "int4", "B": 16, "K": 4096, "N": 1024, "group": 128, "dtype": "bfloat16"},
    {"format": "nf4", "B": 16, "K": 1024, "N": 512, "dtype": "bfloat16"},
]
