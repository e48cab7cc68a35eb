"""The kernels compile for the chips they are written for."""

import jax
import jax.numpy as jnp
import pytest

import frugax
from tests.cases import on_chips

pytestmark = pytest.mark.deviceless

HYPER = {"adam": 5, "lion": 2, "momentum": 1}


def call(rule, shape, group_size, dtype, formats):
    g = jax.ShapeDtypeStruct(shape, dtype)
    moments = jax.eval_shape(
        lambda g: tuple(frugax.formats.quantize(g, f, axis=-1, group_size=group_size) for f in formats),
        g,
    )
    hyper = jax.ShapeDtypeStruct((HYPER[rule],), jnp.float32)
    return (lambda g, m, h: frugax.kernels.quantized_update(rule, g, m, tuple(h))), (g, moments, hyper)


CALLS = [
    ("adam", (1000, 4096), 256, jnp.float32, ("mulaw8", "ufp8_e4m4")),
    ("adam", (65536,), 2048, jnp.bfloat16, ("dynamic8", "udynamic8")),
    ("lion", (2, 40, 384), 128, jnp.float32, ("mulaw8",)),
    ("momentum", (512, 11008), 256, jnp.bfloat16, ("int8",)),
]


@pytest.mark.parametrize(("chip", "args"), on_chips(["v5e", "v5p", "v6e", "tpu7x"], CALLS))
def test_compiles_for_tpu(chip, args):
    deviceless_tpu = pytest.importorskip("experiments.benchmarks.deviceless_tpu")
    if not deviceless_tpu.has_libtpu():
        pytest.skip("libtpu is not installed")
    f, structs = call(*args)
    assert "tpu_custom_call" in deviceless_tpu.compile_for(chip, f, *structs).as_text()


@pytest.mark.parametrize("args", CALLS, ids=lambda a: f"{a[0]}-{a[1]}")
def test_compiles_for_h200_without_spills(args):
    pytest.importorskip("jax_plugins.xla_cuda13")
    from experiments.benchmarks.deviceless_gpu import kernels_for_h200

    f, structs = call(*args)
    (kernel,) = kernels_for_h200(f, *structs)
    assert kernel.spill_stores == kernel.spill_loads == 0
