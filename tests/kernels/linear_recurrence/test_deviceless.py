"""The kernels compile for the chips they are written for, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import frugax
from tests.cases import on_chips

pytestmark = pytest.mark.deviceless


def value_and_gradient(a, b, state, dh, *, reverse):
    def call(a, b, state):
        return frugax.kernels.linear_recurrence(a, b, initial_state=state, reverse=reverse)

    out, pullback = jax.vjp(call, a, b, state)
    return out, pullback((dh, state))


def structs(B, T, D, dtype):
    x = jax.ShapeDtypeStruct((B, T, D), dtype)
    return x, x, jax.ShapeDtypeStruct((B, D), jnp.float32), x


CALLS = [((2, 2048, 1024), jnp.bfloat16, False), ((1, 130, 60), jnp.float32, True)]


@pytest.mark.parametrize(("chip", "call"), on_chips(["v5e", "v5p", "v6e", "tpu7x"], CALLS))
def test_compiles_for_tpu(chip, call):
    shape, dtype, reverse = call
    deviceless_tpu = pytest.importorskip("experiments.benchmarks.deviceless_tpu")
    if not deviceless_tpu.has_libtpu():
        pytest.skip("libtpu is not installed")
    f = partial(value_and_gradient, reverse=reverse)
    compiled = deviceless_tpu.compile_for(chip, f, *structs(*shape, dtype))
    assert compiled.as_text().count("tpu_custom_call") >= 2


@pytest.mark.parametrize(("shape", "dtype", "reverse"), CALLS)
def test_compiles_for_h200_without_spills(shape, dtype, reverse):
    pytest.importorskip("jax_plugins.xla_cuda13")
    from experiments.benchmarks.deviceless_gpu import kernels_for_h200

    f = partial(value_and_gradient, reverse=reverse)
    kernels = kernels_for_h200(f, *structs(*shape, dtype))
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.spill_stores == kernel.spill_loads == 0
        assert kernel.shared_bytes < 228 * 1024
