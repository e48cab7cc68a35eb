"""Both kernels of causal_conv1d, forward and backward, through the compilers of the chips they are for."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

import frugax
from experiments.benchmarks import deviceless_gpu, deviceless_tpu
from tests.cases import on_chips

pytestmark = pytest.mark.deviceless

# B, T, D, W, dtype, segments and state
CALLS = [
    (2, 2048, 1024, 4, jnp.bfloat16, False),
    (2, 1000, 200, 5, jnp.float32, True),
    (2, 1, 256, 2, jnp.bfloat16, True),
    (1, 100, 60, 1, jnp.float32, False),
]


def structs(B, T, D, W, dtype, rest):
    x, f32 = jax.ShapeDtypeStruct((B, T, D), dtype), jnp.float32
    weight, bias = jax.ShapeDtypeStruct((W, D), f32), jax.ShapeDtypeStruct((D,), f32)
    state = jax.ShapeDtypeStruct((B, W - 1, D), dtype) if rest else None
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32) if rest else None
    return x, weight, bias, state, ids


def value_and_gradients(x, weight, bias, state, ids):
    def f(x, weight, bias, state):
        return frugax.kernels.causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, segment_ids=ids
        )

    out, vjp = jax.vjp(f, x, weight, bias, state)
    return out, vjp(out)


@pytest.mark.skipif(not deviceless_tpu.has_libtpu(), reason="needs libtpu")
@pytest.mark.parametrize(("chip", "call"), on_chips(deviceless_tpu.CHIPS, CALLS))
def test_tpu(chip, call):
    program = deviceless_tpu.compile_for(chip, value_and_gradients, *structs(*call)).as_text()
    assert len(re.findall(r"custom-call\(.*tpu_custom_call", program)) == 2


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA plugin")
@pytest.mark.parametrize("call", [*CALLS, (1, 300, 256, 16, jnp.bfloat16, True)], ids=str)
def test_h200_without_spills(call):
    kernels = deviceless_gpu.kernels_for_h200(value_and_gradients, *structs(*call))
    assert len(kernels) == 2
    assert [k.spill_stores for k in kernels] == [0, 0], deviceless_gpu.table(kernels)


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the CUDA plugin")
def test_h200_under_vmap():
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((3, *s.shape), s.dtype), structs(*CALLS[1]))
    assert len(deviceless_gpu.kernels_for_h200(jax.vmap(value_and_gradients), *stacked)) == 2
