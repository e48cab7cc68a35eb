"""Tests of quantized_update alone: chunks of large leaves, lean temporaries, subnormal numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.kernels.quantized_update.tiling import CHUNK
from tests.kernels.harness import OPERATIONS

from .calls import DYNAMIC, HYPER, MU, case

ROW = OPERATIONS["quantized_update"]


def test_chunks_and_their_rest_in_place():
    """More rows than one chunk, with some left over; temporaries are a chunk's, not a leaf's."""
    for shape, group_size in (((2 * CHUNK // 256 + 5, 256), 256), ((CHUNK // 700 + 3, 700), 256)):
        arguments = ROW.arguments(case("adam", shape, group_size, DYNAMIC))
        g, moments = jnp.asarray(arguments["grad"]), arguments["moments"]
        f = jax.jit(
            lambda g, m: frugax.kernels.quantized_update("adam", g, m, HYPER["adam"]), donate_argnums=(0, 1)
        )
        compiled = f.lower(g, moments).compile()
        results = compiled(g + 0, jax.tree.map(lambda x: x + 0, moments))
        ROW.check(arguments, results, name=str(shape))


def temporaries(rows, columns):
    """Return the bytes that a step on a leaf takes, besides what it updates in place."""
    g = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    moments = jax.eval_shape(
        lambda g: tuple(frugax.formats.quantize(g, n, axis=-1, group_size=256) for n in DYNAMIC), g
    )
    f = jax.jit(
        lambda g, m: frugax.kernels.quantized_update("adam", g, m, HYPER["adam"]), donate_argnums=(0, 1)
    )
    return f.lower(g, moments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.nan
def test_temporaries_do_not_grow_with_the_leaf():
    """A leaf of 64 MB needs six float32 copies of a chunk at most."""
    large = temporaries(4096, 4096)
    assert large < 6 * 4 * CHUNK
    assert abs(large - temporaries(1024, 4096)) < 2**17


@pytest.mark.nan
@pytest.mark.full
@pytest.mark.parametrize(("rows", "columns"), [(64, 1024), (1000, 640), (512, 4096)])
def test_temporaries_are_less_than_8_bits_save(rows, columns):
    """Six bytes a number."""
    assert temporaries(rows, columns) < 6 * rows * columns


@pytest.mark.parametrize("formats", [DYNAMIC, MU])
@pytest.mark.parametrize("backend", ["xla", "pallas_tpu", "pallas_gpu"])
def test_numbers_below_the_normal_ones(backend, formats):
    """Second moments of 1e-43, one over which is no float32, become zero or stay; nothing is inf or NaN."""
    g = jnp.full((3, 256), 1e-20, jnp.float32).at[0].set(1.0)
    moments = tuple(
        frugax.formats.quantize(jnp.zeros((3, 256), jnp.float32), name, axis=-1, group_size=128)
        for name in formats
    )
    update, (m, v) = frugax.kernels.quantized_update("adam", g, moments, HYPER["adam"], backend=backend)
    assert np.isfinite(update).all()
    np.testing.assert_allclose(m.dequantize(), 0.1 * g, rtol=1e-5)
    np.testing.assert_allclose(v.dequantize(), 0.001 * g * g, rtol=1e-5, atol=1e-38)


@pytest.mark.nan
@pytest.mark.parametrize(
    "backend", ["reference", "xla", "pallas_tpu", pytest.param("pallas_gpu", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("bad", [np.inf, pytest.param(np.nan, marks=pytest.mark.full)])
def test_a_group_with_a_number_that_is_not_finite_is_nan(backend, bad):
    """As `quantize` has it, whatever the codes; the other groups are finite."""
    g = jnp.ones((3, 256), jnp.float32).at[1, 7].set(bad)
    zeros = jnp.zeros((3, 256), jnp.float32)
    moments = tuple(
        frugax.formats.quantize(zeros, name, axis=-1, group_size=128) for name in ("mulaw8", "ufp8_e4m4")
    )
    _, new = frugax.kernels.quantized_update("adam", g, moments, HYPER["adam"], backend=backend)
    for moment, like in zip(new, ("mulaw8", "ufp8_e4m4"), strict=True):
        scales, values = np.asarray(moment.scales), np.asarray(moment.dequantize())
        want = frugax.formats.quantize(g, like, axis=-1, group_size=128).dequantize()
        np.testing.assert_array_equal(np.isnan(values), np.isnan(want))
        assert np.isnan(scales).tolist() == [[False] * 2, [True, False], [False] * 2]
