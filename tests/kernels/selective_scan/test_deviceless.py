"""The kernels compile for the chips they are written for, forward and backward."""

import jax
import jax.numpy as jnp
import pytest

import frugax
from tests.cases import on_chips

pytestmark = pytest.mark.deviceless


def value_and_gradient(floats, starts, dy, dstate):
    def call(floats):
        return frugax.kernels.selective_scan(**floats, dt_softplus="z" in floats, segment_ids=starts)

    out, pullback = jax.vjp(call, floats)
    return out, pullback((dy, dstate))


def structs(T, D, N, dtype, whole):
    shaped = jax.ShapeDtypeStruct
    x, rows, vector = shaped((1, T, D), dtype), shaped((1, T, N), dtype), shaped((D,), jnp.float32)
    state = shaped((1, D, N), jnp.float32)
    floats = dict(x=x, dt=x, A=shaped((D, N), jnp.float32), B=rows, C=rows)
    if whole:
        floats |= dict(D=vector, z=x, dt_bias=vector, initial_state=state)
    return floats, shaped((1, T), jnp.int32) if whole else None, x, state


CALLS = [(1024, 1024, 16, jnp.bfloat16, True), (130, 60, 4, jnp.float32, False)]


@pytest.mark.parametrize(("chip", "call"), on_chips(["v5e", "v6e", "tpu7x"], CALLS))
def test_compiles_for_tpu(chip, call):
    deviceless_tpu = pytest.importorskip("experiments.benchmarks.deviceless_tpu")
    if not deviceless_tpu.has_libtpu():
        pytest.skip("libtpu is not installed")
    compiled = deviceless_tpu.compile_for(chip, value_and_gradient, *structs(*call))
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_compiles_for_h200_without_spills(call):
    pytest.importorskip("jax_plugins.xla_cuda13")
    from experiments.benchmarks.deviceless_gpu import kernels_for_h200

    kernels = kernels_for_h200(value_and_gradient, *structs(*call))
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0
        assert kernel.shared_bytes < 227 * 1024
