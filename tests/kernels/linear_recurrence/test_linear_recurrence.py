"""Tests of linear_recurrence alone: gates of every strength over many tokens and blocks, lean gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, expected, run, value_and_gradients

from . import definition

ROW = OPERATIONS["linear_recurrence"]


def test_gates_of_every_strength_over_65536_tokens():
    """Products of a's that underflow at once, or that would overflow within a chunk: only h itself counts."""
    rng = np.random.default_rng(0)
    shape = (1, 65536, 4)
    b = rng.standard_normal(shape).astype(np.float32)
    fading = np.exp(-np.exp(rng.uniform(np.log(1e-4), np.log(50), shape))).astype(np.float32)
    bursts = np.where(np.arange(shape[1])[:, None] % 100 == 0, 1e-30, 2.0) * np.ones(shape)
    grown = np.arange(shape[1])[:, None] % 100 >= 80  # 20 tokens at 2.0, before each 1e-30
    for gates, source in ((fading, b), (bursts.astype(np.float32), b * grown)):
        got = run(ROW, {"a": gates, "b": source}, "xla")
        assert_close(got, definition.linear_recurrence(gates.astype(float), source.astype(float)), "float32")


@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.full), True])
def test_many_blocks_on_tpu(reverse):
    """More tokens and channels than one block has, with a remainder of both. (A GPU's tiles are small.)"""
    case = {"T": 1100, "D": 600, "B": 1, "state": True, "reverse": reverse}
    got = value_and_gradients(ROW, ROW.arguments(case), "pallas_tpu")
    assert_close(got, expected(ROW, case), "float32")


def test_gradient_keeps_a_and_h_alone():
    """Temporaries of forward and gradient: h, and what comes back through it; no more for a longer T."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((2, T, 128), jnp.float32)

        def loss(a, b, w):
            return jnp.sum(ROW.call("xla", a=a, b=b)[0] * w)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (2 * T * 128 * 4)

    assert temporaries(512) < 3.5
    assert temporaries(4096) < 3.5
