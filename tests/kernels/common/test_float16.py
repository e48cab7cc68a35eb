"""float16, whose largest number is 65504: right wherever the result fits, whatever stands between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, expected, over, value_and_gradients

F16 = jnp.float16


def differentiable() -> list:
    """Return the operations: by default those that are made of no others."""
    names = over(lambda row: row.check is None)
    return [pytest.param(n, marks=pytest.mark.full) if OPERATIONS[n].composed else n for n in names]


@pytest.mark.parametrize("operation", differentiable())
def test_values_and_gradients(operation):
    row = OPERATIONS[operation]
    case = row.small | {"dtype": "float16"}
    got = value_and_gradients(row, row.arguments(case), None)
    assert got[0][0].dtype == F16
    assert_close(got, expected(row, case), "float16")


def test_a_state_above_the_range():
    q, kv = jnp.full((1, 4096, 1, 8), 0.01, F16), jnp.full((1, 4096, 1, 8), 8.0, F16)
    out, _ = kernels.linear_attention(q, kv, kv)
    exact = 0.01 * 64 * 8 * np.arange(1, 4097) * 8**-0.5
    assert_close(out[0, :, 0, 0], float(q[0, 0, 0, 0]) / 0.01 * exact, "float16")
    assert float(out[0, -1, 0, 0]) == pytest.approx(7414.6, rel=1e-3)


def test_scores_above_the_range():
    q, k, v = (jnp.full((1, 4, 1, 8), x, F16) for x in (200.0, 100.0, 1e-3))
    out, _ = kernels.linear_attention(q, k, v, scale=1.0)
    assert_close(out[0, :, 0, 0], 8 * 200 * 100 * float(v[0, 0, 0, 0]) * np.arange(1, 5), "float16")


@pytest.mark.parametrize("operation", ["ssd", "trapezoidal_ssd"])
def test_an_input_times_its_step_below_the_range(operation):
    x, B, C = (np.full((1, 4, 1, 1), value, np.float16) for value in (1e-4, 1.0, 3e4))
    dt, ones = np.full((1, 4, 1), 1e-4, np.float16), np.ones((1, 4, 1), np.float32)
    if operation == "ssd":
        y, _ = jax.jit(kernels.ssd)(x, dt, np.zeros(1, np.float32), B, C)
    else:
        y, _ = jax.jit(kernels.trapezoidal_ssd)(x, dt, 0 * ones, B, C, ones)
    exact = float(x[0, 0, 0, 0]) * float(dt[0, 0, 0]) * float(C[0, 0, 0, 0]) * np.arange(1, 5)
    assert_close(np.asarray(y)[0, :, 0, 0], exact, "float16")


def test_a_recurrent_state_above_the_range():
    """An Elman network's first state may be anything."""
    state = jnp.full((1, 1, 1, 1), 1e5, jnp.float32)
    h, _ = kernels.rnn(
        jnp.full((1, 1, 1, 1, 1), -1.0, F16),
        jnp.full((1, 1, 1, 1), 1e-5, F16),
        cell="elman",
        initial_state=state,
    )
    assert float(h[0, 0, 0, 0]) == pytest.approx(np.tanh(float(F16(1e-5)) * 1e5 - 1), abs=1e-3)


def test_paths_of_an_image_that_cancel():
    """Two of the four paths bring 6e4 to every pixel, and two take it off again."""
    x, ones = np.full((1, 2, 2, 1), 6e4, np.float16), np.ones((4, 1, 4, 1), np.float16)
    sign, rates = np.array([[1.0], [1.0], [-1.0], [-1.0]], np.float16), -np.ones((4, 1, 1), np.float32)
    run = jax.jit(kernels.selective_scan_2d)
    np.testing.assert_array_equal(run(x, 0 * ones, rates, ones, ones, sign), 0)
    np.testing.assert_array_equal(run(x, 0 * ones, rates, ones, ones, abs(sign) / 4), x)
