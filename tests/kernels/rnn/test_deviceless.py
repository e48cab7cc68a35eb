"""The kernels compile for the chips they are written for, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import frugax
from frugax.kernels.rnn.cells import CELLS

pytestmark = pytest.mark.deviceless


def value_and_gradient(gates, recurrent, bias, state, ids, dh, *, cell):
    def call(gates, recurrent, bias, state):
        return frugax.kernels.rnn(gates, recurrent, bias, cell=cell, initial_state=state, segment_ids=ids)

    out, pullback = jax.vjp(call, gates, recurrent, bias, state)
    return out, pullback((dh, state))


def structs(cell, B, T, H, D, dtype, packed):
    G, S = CELLS[cell].gates, len(CELLS[cell].states)
    shapes = (B, T, H, G, D), (H, G, D, D), (H, G, D)
    return (
        *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes),
        jax.ShapeDtypeStruct((B, S, H, D), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32) if packed else None,
        jax.ShapeDtypeStruct((B, T, H, D), dtype),
    )


TPU_CALLS = {
    "v5e": [("lstm", 3, 70, 2, 100, jnp.bfloat16, True), ("slstm", 2, 9, 1, 256, jnp.float32, False)],
    "v5p": [("gru", 9, 40, 2, 64, jnp.bfloat16, True)],
    "v6e": [("slstm", 1, 33, 2, 200, jnp.bfloat16, True), ("lstm", 16, 64, 1, 640, jnp.bfloat16, False)],
    "tpu7x": [("elman", 4, 20, 1, 128, jnp.float32, True)],
}


@pytest.mark.parametrize(
    ("chip", "call"), [(chip, call) for chip, calls in TPU_CALLS.items() for call in calls]
)
def test_compiles_for_tpu(chip, call):
    deviceless_tpu = pytest.importorskip("experiments.benchmarks.deviceless_tpu")
    if not deviceless_tpu.has_libtpu():
        pytest.skip("libtpu is not installed")
    f = partial(value_and_gradient, cell=call[0])
    compiled = deviceless_tpu.compile_for(chip, f, *structs(*call))
    assert compiled.as_text().count("tpu_custom_call") >= 2


# The largest heads that each cell's kernels take, whose registers are the fullest.
@pytest.mark.parametrize(
    ("cell", "D", "packed", "spilled"),
    [("lstm", 128, False, 0), ("gru", 128, True, 0), ("elman", 256, True, 0), ("slstm", 100, True, 200)],
)
def test_compiles_for_h200(cell, D, packed, spilled):
    pytest.importorskip("jax_plugins.xla_cuda13")
    from experiments.benchmarks.deviceless_gpu import kernels_for_h200

    f = partial(value_and_gradient, cell=cell)
    kernels = kernels_for_h200(f, *structs(cell, 5, 33, 2, D, jnp.bfloat16, packed))
    assert [kernel.name.rstrip("_0123456789") for kernel in kernels] == ["rnn_forward", "rnn_backward"]
    for kernel in kernels:
        assert kernel.spill_stores <= spilled  # bytes a thread, of the walk back alone
        assert kernel.shared_bytes <= 227 * 1024
        assert kernel.wgmma > 0
    assert kernels[0].spill_stores == 0
