"""Linear attention compiled for TPU and Hopper: no copies; the kernels' names, and two at once."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import frugax
from experiments.benchmarks.deviceless_gpu import compile_for_h200, kernels_for_h200
from experiments.benchmarks.deviceless_tpu import compile_for, has_libtpu
from frugax.kernels.linear_attention import pallas_tpu
from frugax.kernels.linear_attention.features import taylor
from frugax.kernels.linear_attention.inputs import Inputs
from tests.kernels.harness import OPERATIONS, both_passes

from .calls import TAYLOR

pytestmark = pytest.mark.deviceless


@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_eight_heads_compile_without_a_copy(chip, dtype):
    """Forward, ragged, eight heads of 128 lanes: on chips before tpu7x no operand is transposed or padded."""
    x = jax.ShapeDtypeStruct((1, 300, 8, 128), dtype)
    call = Inputs(x, x, x, jax.ShapeDtypeStruct((1, 300, 8), jnp.float32), None, None, None)
    text = compile_for(chip, partial(pallas_tpu.forward, scale=0.1, interpret=False), call).as_text()
    if chip == "v5e":
        assert " transpose(" not in text
        assert " copy(" not in text


@pytest.mark.full
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
def test_taylor_features_stay_in_the_kernel():
    """A gradient's temporaries are less than a fifth of the features of q and k: they are never in HBM."""
    q, v = (jax.ShapeDtypeStruct((1, 2048, 16, width), jnp.bfloat16) for width in (16, 65))

    def loss(q, k, v):
        out, _ = frugax.kernels.linear_attention(q, k, v, feature_map="taylor", scale=1.0)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    program = compile_for("v5e", jax.grad(loss, (0, 1, 2)), q, q, v)
    features = 2 * 2048 * 16 * 153 * 2
    assert program.memory_analysis().temp_size_in_bytes < features / 5
    assert program.cost_analysis()["bytes accessed"] < 10 * features


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
def test_taylor_features_stay_in_hoppers_kernel():
    """A gradient's temporaries are less than a third of those with the features of q and k in memory."""
    q, v = (jax.ShapeDtypeStruct((1, 2048, 16, width), jnp.bfloat16) for width in (16, 65))

    def temporaries(feature_map):
        def loss(q, k, v):
            q, k = (q, k) if feature_map else (taylor(q), taylor(k))
            out, _ = frugax.kernels.linear_attention(q, k, v, feature_map=feature_map, scale=1.0)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        program = compile_for_h200(jax.grad(loss, (0, 1, 2)), q, q, v)
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries("taylor") < temporaries(None) / 3


TWO_PASSES = {"states", "outputs", "states_reverse", "outputs_reverse", "gradients"}


WALKS = {"features", "features_d", "features_d_reverse"}
BIG = {"K": 128, "V": 128}


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize(
    ("case", "heads", "names"),
    [
        pytest.param(BIG | {"decay": "bth"}, 4, TWO_PASSES, marks=pytest.mark.full),
        pytest.param(
            BIG | {"decay": "bth"},
            64,
            {"walk", "walk_reverse", "states", "gradients"},
            marks=pytest.mark.full,
        ),
        pytest.param(BIG | {"decay": "bthk"}, 4, TWO_PASSES, marks=pytest.mark.full),
        pytest.param(
            {"K": 16, "V": 65, "state": True, "packed": True} | TAYLOR, 4, WALKS, marks=pytest.mark.full
        ),
        pytest.param({"K": 18, "V": 96} | TAYLOR, 4, WALKS, marks=pytest.mark.full),
    ],
)
def test_two_programs_fit_on_a_processor(case, heads, names):
    """Products run on wgmma, few registers are spilled, and shared memory suffices for two."""
    case = {"T": 192, "heads": (heads,) * 3, "dtype": "bfloat16"} | case
    function, arguments = both_passes(OPERATIONS["linear_attention"], case)
    kernels = kernels_for_h200(function, *arguments)
    assert {k.name.removeprefix("linear_attention_").rstrip("_0123456789") for k in kernels} == names
    for kernel in kernels:
        assert kernel.wgmma > 0
        assert kernel.spill_stores <= 160, kernel  # bytes, of the 1,020 that a thread's registers hold
        assert 2 * (kernel.shared_bytes + 1024) <= 233472, kernel
