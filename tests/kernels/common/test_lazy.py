"""Kernels are traced where their platform is lowered for: nowhere else, and once for calls that are alike."""

import jax
import jax.numpy as jnp
import pytest

import frugax
from tests.devices import QUICK, run_alone

X = jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}


@pytest.mark.parametrize("backend", ["none", pytest.param("xla", marks=pytest.mark.full)])
def test_a_cpu_never_imports_pallas(backend):
    run_alone("tests.kernels.common.without_pallas", backend, flags=QUICK)


def test_calls_that_are_alike_share_one_trace():
    from frugax.kernels.linear_attention import xla

    def layers(q, k, v):
        for _ in range(3):
            v, _ = frugax.kernels.linear_attention(q, k, v)
        return v

    x = jax.ShapeDtypeStruct((2, 37, 2, 8), jnp.float32)  # a shape that no other test has
    before = xla.forward._cache_size()
    jax.jit(layers).trace(x, x, x)
    assert xla.forward._cache_size() == before  # traced, never compiled by itself
    text = str(jax.make_jaxpr(layers)(x, x, x))
    assert text.count("frugax_kernel") == 3
    assert "platform_index" not in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_mapped_call_is_lowered_to_the_kernel_as_well(platform):
    def twice(q, k, v):
        return jax.vmap(
            jax.vmap(frugax.kernels.linear_attention, in_axes=(0, 0, None)), in_axes=(1, 1, None)
        )(q, k, v)

    x = jax.ShapeDtypeStruct((3, 4, *X.shape), X.dtype)
    text = jax.jit(twice).trace(x, x, X).lower(lowering_platforms=(platform,)).as_text()
    assert CALLS[platform] in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_kernels_are_lowered_beside_64_bits(platform):
    """Ids may have 64 bits; what has floats of 64 goes to xla."""
    with jax.enable_x64(True):
        ids = jax.ShapeDtypeStruct((2, 64), jnp.int64)
        for dtype, kernel in ((jnp.float32, True), (jnp.float64, False)):
            x = jax.ShapeDtypeStruct((2, 64, 128), dtype)
            f = jax.jit(lambda a, b, ids: frugax.kernels.linear_recurrence(a, b, segment_ids=ids))
            text = f.trace(x, x, ids).lower(lowering_platforms=(platform,)).as_text()
            assert (CALLS[platform] in text) == kernel


def test_what_a_kernel_cannot_serve_is_lowered_to_xla():
    x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.float32)  # Hopper's takes bfloat16
    f = jax.jit(lambda q, k, v: frugax.kernels.linear_attention(q, k, v))
    assert "mosaic_gpu" not in f.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "tpu_custom_call" in f.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()


def test_a_cpu_holds_no_array_that_only_a_tpu_reads():
    """The states that a TPU's forward pass keeps for its gradient, one in 128 tokens: [B, T / 128, N, D]."""
    B, T, D, N, layers = 2, 1280, 48, 16, 5
    rows = jnp.ones((B, T, N), jnp.float32)

    def layer(x, _):
        return frugax.kernels.selective_scan(x, x, -jnp.ones((D, N), jnp.float32), rows, rows)[0], None

    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, None, length=layers)[0])))
    text = gradient.lower(jnp.ones((B, T, D), jnp.float32)).compile().as_text()
    assert f"f32[{layers},{B},{T},{D}]" in text  # each layer's input, so that such an array would be found
    assert f"{B},{T // 128},{N},{D}]" not in text
