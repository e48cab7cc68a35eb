"""Calls of quantized_update: how one is drawn, and which each backend has to get right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import frugax

HYPER = {
    "adam": (0.9, 0.999, 1e-8, 1 / (1 - 0.9**3), 1 / (1 - 0.999**3)),
    "lion": (0.9, 0.99),
    "momentum": (0.9,),
    "nesterov": (0.9,),
}


def draw(rng, rule, shape, group_size, formats, dtype="float32"):
    """A gradient whose rows differ in size, and moments that have seen others; one group is zero."""
    rows = 10 ** rng.uniform(-4, 0, (*shape[:-1], 1))
    g = (rows * rng.standard_normal(shape)).astype(jnp.dtype(dtype))
    moments = []
    for i, name in enumerate(formats):
        x = rows * rng.standard_normal(shape) if i == 0 else (rows * rng.standard_normal(shape)) ** 2
        x[..., :group_size] *= len(shape) > 1
        x = jnp.asarray(x, jnp.float32)
        moments.append(frugax.formats.quantize(x, name, axis=-1, group_size=group_size))
    return {"rule": rule, "grad": g, "moments": tuple(moments), "hyper": HYPER[rule]}


def case(rule, shape, group_size, formats, dtype="float32"):
    return {"rule": rule, "shape": shape, "group_size": group_size, "formats": formats, "dtype": dtype}


DYNAMIC, MU = ("dynamic8", "udynamic8"), ("mulaw8", "ufp8_e4m4")
RICH = [
    case("adam", (5, 2, 300), 128, MU, "bfloat16"),  # the last group has 44
    case("lion", (1000,), 250, ("dynamic8",)),
    case("momentum", (9, 60), 60, ("int8",)),
    case("nesterov", (3, 256), 256, ("mulaw8",)),
    case("adam", (7, 512), 256, DYNAMIC),
]
LIST = [
    case("adam", (7, 512), 256, DYNAMIC),
    case("adam", (2, 37, 384), 128, MU, "bfloat16"),
    case("adam", (5, 2, 300), 128, MU),
    case("adam", (1000,), 256, DYNAMIC),
    case("lion", (9, 60), 60, ("dynamic8",)),
    case("momentum", (70, 256), 128, ("int8",)),
    case("nesterov", (3, 256), 256, ("mulaw8",)),
]
CASES = {
    "reference": RICH + LIST,
    "xla": RICH + LIST,
    "pallas_tpu": [case for case in LIST if case["shape"][-1] % 128 == 0],
    # A GPU's kernel is interpreted slowly: few groups, but more than one block of them, with a rest.
    "pallas_gpu": [
        case("adam", (67, 128), 128, DYNAMIC),
        case("adam", (3, 512), 256, MU, "bfloat16"),
        case("lion", (1024,), 512, ("int8",)),
    ],
}


def has(case: dict) -> set:
    """Return what a kernel has code of its own for."""
    shape = case["shape"]
    rest = "rest" if shape[-1] % case["group_size"] else "whole"
    return {case["rule"], case["dtype"], *case["formats"], f"{len(shape)} axes", rest}


COMPILED = [
    case("adam", (1000, 4096), 256, MU),
    case("adam", (65536,), 2048, DYNAMIC, "bfloat16"),
    case("lion", (2, 40, 384), 128, ("mulaw8",)),
    case("momentum", (512, 11008), 256, ("int8",), "bfloat16"),
]


def shaped(rule, shape, group_size, formats, dtype):
    """Return a call with the shapes of its moments in their place: importing this computes nothing."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    moments = (
        jax.eval_shape(partial(frugax.formats.quantize, format=name, axis=-1, group_size=group_size), x)
        for name in formats
    )
    return {
        "rule": rule,
        "grad": np.zeros(shape, jnp.dtype(dtype)),
        "moments": tuple(moments),
        "hyper": HYPER[rule],
    }


GOOD, SHORT = shaped(**LIST[0]), shaped(**LIST[2])
WRONG = [
    ({"rule": "adan"}, "rule: got 'adan'"),
    ({"grad": GOOD["grad"][0, 0]}, "grad: got"),
    ({"moments": GOOD["moments"][:1]}, "moments: got 1; expected 2"),
    ({"hyper": (0.9,)}, "hyper: got 1 numbers; expected b1, b2"),
    ({"grad": GOOD["grad"][:2]}, "moments.0.: got dynamic8"),
]
REFUSED = [("pallas_tpu", SHORT, "128 does not divide")]
