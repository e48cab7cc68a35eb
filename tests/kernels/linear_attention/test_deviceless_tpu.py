"""The TPU compiler takes every kernel of linear attention, on every chip, without one."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.deviceless_tpu import CHIPS, compile_for, has_libtpu
from frugax.kernels.linear_attention import pallas_tpu
from frugax.kernels.linear_attention.inputs import Inputs
from tests.cases import on_chips

pytestmark = [
    pytest.mark.deviceless,
    pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)"),
]


def structs(*, B=1, T=256, heads=(1, 1, 1), K=128, V=128, decay=None, dtype=jnp.bfloat16, full=False):
    """The call and its cotangents; `full` adds a bonus, an initial state and packed documents."""
    H, f32 = max(heads), jnp.float32
    q, k, v = (
        jax.ShapeDtypeStruct((B, T, h, width), dtype) for h, width in zip(heads, (K, K, V), strict=True)
    )
    shapes = {"h": (H,), "bth": (B, T, H), "bthk": (B, T, H, K)}
    log_decay = None if decay is None else jax.ShapeDtypeStruct(shapes[decay], f32)
    state = jax.ShapeDtypeStruct((B, H, K, V), f32)
    extras = (jax.ShapeDtypeStruct((H, K), f32), state, jax.ShapeDtypeStruct((B, T), jnp.int32))
    call = Inputs(q, k, v, log_decay, *(extras if full else (None, None, None)))
    return call, (jax.ShapeDtypeStruct((B, T, H, V), dtype), state)


def compile_both(chip, call, cotangents):
    assert pallas_tpu.unsupported_reason(call) is None

    def both(call, cotangents):
        out = pallas_tpu.forward(call, 0.1, interpret=False)
        return out, pallas_tpu.backward(call, cotangents, 0.1, interpret=False)

    text = compile_for(chip, both, call, cotangents).as_text()
    for name in ("forward", "states", "backward"):
        assert f"linear_attention_{name}" in text


@pytest.mark.parametrize(("chip", "decay"), on_chips(CHIPS, [None, "bth", "bthk"]))
def test_compiles(chip, decay):
    compile_both(chip, *structs(decay=decay))


ODD = {
    "one token": dict(T=1, decay="h", K=64, V=64),
    "ragged and full": dict(T=300, decay="bth", K=60, V=24, full=True, heads=(2, 1, 1)),
    "channels, full": dict(T=100, decay="bthk", K=64, V=100, full=True),
    "float32": dict(T=130, decay="bthk", dtype=jnp.float32),
    "wide": dict(T=129, decay="bth", K=256, V=256),
    "eight wide heads": dict(T=64, heads=(8, 8, 8), K=256, V=384),
    "Mamba-2 groups": dict(T=200, decay="bth", heads=(1, 1, 4), V=64),
}
ODD_FULL = dict.fromkeys(("one token", "float32", "wide", "Mamba-2 groups"), pytest.mark.full)


@pytest.mark.parametrize("case", [pytest.param(name, marks=ODD_FULL.get(name, ())) for name in ODD])
def test_odd_shapes_compile(case):
    compile_both("v5e", *structs(**ODD[case]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_eight_heads_compile_without_a_copy(chip, dtype):
    """Forward, ragged, eight heads of 128 lanes: on chips before tpu7x no operand is transposed or padded."""
    call, _ = structs(T=300, heads=(8, 8, 8), decay="bth", dtype=dtype)
    text = compile_for(chip, partial(pallas_tpu.forward, scale=0.1, interpret=False), call).as_text()
    if chip == "v5e":
        assert " transpose(" not in text
        assert " copy(" not in text
