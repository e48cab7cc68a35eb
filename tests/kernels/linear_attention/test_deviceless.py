"""Linear attention compiled for TPU and Hopper: no copies; the kernels' names, and two at once."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.deviceless_gpu import kernels_for_h200
from experiments.benchmarks.deviceless_tpu import compile_for, has_libtpu
from frugax.kernels.linear_attention import pallas_tpu
from frugax.kernels.linear_attention.inputs import Inputs
from tests.kernels.harness import OPERATIONS, both_passes

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


TWO_PASSES = {"states", "outputs", "states_reverse", "outputs_reverse", "gradients"}


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize(
    ("decay", "heads", "names"),
    [
        pytest.param("bth", 4, TWO_PASSES, marks=pytest.mark.full),
        ("bth", 64, {"walk", "walk_reverse", "states", "gradients"}),
        pytest.param("bthk", 4, TWO_PASSES, marks=pytest.mark.full),
    ],
)
def test_two_programs_fit_on_a_processor(decay, heads, names):
    """Products run on wgmma, few registers are spilled, and shared memory suffices for two."""
    case = {"T": 192, "heads": (heads,) * 3, "K": 128, "V": 128, "decay": decay, "dtype": "bfloat16"}
    function, arguments = both_passes(OPERATIONS["linear_attention"], case)
    kernels = kernels_for_h200(function, *arguments)
    assert {k.name.removeprefix("linear_attention_").rstrip("_0123456789") for k in kernels} == names
    for kernel in kernels:
        assert kernel.wgmma > 0
        assert kernel.spill_stores <= 160, kernel  # bytes, of the 1,020 that a thread's registers hold
        assert 2 * (kernel.shared_bytes + 1024) <= 233472, kernel
