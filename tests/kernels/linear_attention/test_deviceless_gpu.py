"""The Mosaic GPU kernels pass the real compiler for an H200: every decay shape, head size and feature."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.deviceless_gpu import compile_for_h200, kernels_for_h200
from frugax.kernels.linear_attention import pallas_gpu
from frugax.kernels.linear_attention.inputs import check

pytestmark = [
    pytest.mark.deviceless,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax-cuda13-plugin is not installed"
    ),
]


def call_of(decay, K, V, *, heads=(4, 4, 4), T=256, rich=False, gate=jnp.float32):
    """Both passes of a call as one function, and what it takes: with bonus, states, packing where `rich`."""
    B, H = 2, max(heads)
    sizes = dict(b=B, t=T, h=H, k=K, v=V)

    def struct(names, dtype):
        return jax.ShapeDtypeStruct(tuple(sizes[n] for n in names), dtype)

    q, k, v = (
        jax.ShapeDtypeStruct((B, T, h, n), jnp.bfloat16) for h, n in zip(heads, (K, K, V), strict=True)
    )
    g = struct(decay, gate) if decay else None
    more = [struct("hk", jnp.float32), struct("bhkv", jnp.float32), struct("bt", jnp.int32)]
    call = jax.eval_shape(check, q, k, v, g, *(more if rich else [None] * 3))
    assert pallas_gpu.unsupported_reason(call) is None

    def both(call):
        out = pallas_gpu.forward(call, 0.1, interpret=False)
        return out, pallas_gpu.backward(call, out, 0.1, interpret=False)

    return both, call


@pytest.mark.parametrize(
    ("decay", "K", "V", "more"),
    [
        pytest.param(None, 64, 64, {}, marks=pytest.mark.full),
        pytest.param("h", 128, 64, {"T": 100}, marks=pytest.mark.full),
        ("bth", 256, 256, {"rich": True, "heads": (1, 1, 4)}),
        ("bthk", 64, 64, {"rich": True, "heads": (4, 2, 2), "T": 1}),
        pytest.param("bthk", 256, 256, {"gate": jnp.bfloat16}, marks=pytest.mark.full),
        pytest.param("bthk", 80, 40, {}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_forward_and_backward_compile(decay, K, V, more):
    program = compile_for_h200(*call_of(decay, K, V, **more)).as_text()
    assert program.count("mosaic_gpu") >= 6


TWO_PASSES = {"states", "outputs", "states_reverse", "outputs_reverse", "gradients"}


@pytest.mark.parametrize(
    ("decay", "heads", "expected"),
    [
        pytest.param("bth", 4, TWO_PASSES, marks=pytest.mark.full),
        ("bth", 64, {"walk", "walk_reverse", "states", "gradients"}),
        ("bthk", 4, TWO_PASSES),
    ],
)
def test_kernels_fit(decay, heads, expected):
    """Products run on wgmma, registers stay in registers but for a few, and shared memory suffices."""
    kernels = kernels_for_h200(*call_of(decay, 128, 128, T=192, heads=(heads,) * 3))
    assert {
        kernel.name.removeprefix("linear_attention_").rstrip("_0123456789") for kernel in kernels
    } == expected
    for kernel in kernels:
        assert kernel.wgmma > 0
        assert kernel.spill_stores <= 160, kernel  # bytes, of the 1,020 that a thread's registers hold
        assert 2 * (kernel.shared_bytes + 1024) <= 233472, kernel  # two programs on a processor
