"""Tests of causal_conv1d alone: blocks of a long sequence, dtypes that fall back, names of an activation."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.deviceless_gpu import kernels_for_h200
from frugax.kernels import causal_conv1d
from frugax.kernels.causal_conv1d import pallas_tpu
from frugax.kernels.causal_conv1d.tiling import TPUTiling
from frugax.kernels.common.operation import BACKENDS
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, both_passes, expected, value_and_gradients

from .calls import PACKED


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_kernels_refuse_float64_by_name_and_fall_back_otherwise(backend):
    with jax.enable_x64(True):
        x, weight = jnp.ones((1, 8, 128)), jnp.ones((4, 128))
        with pytest.raises(ValueError, match="float64"):
            causal_conv1d(x, weight, backend=backend)
        assert causal_conv1d(x, weight)[0].dtype == jnp.float64


def test_blocks_of_a_tpu_sequence(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "for_tpu", lambda call, **_: TPUTiling(time=32, channels=128))
    row, case = OPERATIONS["causal_conv1d"], {"T": 131, "D": 200, "W": 5} | PACKED  # a shape of its own
    got = value_and_gradients(row, row.arguments(case), "pallas_tpu")
    assert_close(got, expected(row, case), "float32")


@pytest.mark.nan
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_documents_nan_stays_there(backend):
    x, ids = np.ones((1, 10, 8), np.float32), np.repeat(np.arange(2, dtype=np.int32), 5)[None]
    x[:, :5] = np.nan
    run = jax.jit(lambda x, w, ids: causal_conv1d(x, w, segment_ids=ids, backend=backend))
    y, state = run(x, np.ones((4, 8), np.float32), ids)
    np.testing.assert_array_equal(np.asarray(y)[0, 5:, 0], [1, 2, 3, 4, 4])
    np.testing.assert_array_equal(state, np.ones((1, 3, 8)))


def test_swish_is_silu():
    x, weight = jnp.ones((1, 5, 3)), jnp.ones((2, 3))
    np.testing.assert_array_equal(
        causal_conv1d(x, weight, activation="swish")[0], causal_conv1d(x, weight, activation="silu")[0]
    )


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
def test_mapped_calls_are_two_kernels_on_h200():
    function, arguments = both_passes(OPERATIONS["causal_conv1d"], {"T": 200, "D": 130, "W": 4} | PACKED)
    stacked = jax.tree.map(lambda s: jax.ShapeDtypeStruct((3, *s.shape), s.dtype), arguments)
    assert len(kernels_for_h200(jax.vmap(function), *stacked)) == 2
