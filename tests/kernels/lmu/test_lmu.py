"""The Legendre delay system: against scipy's zero-order hold in a loop, and as a delay."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from numpy.polynomial import legendre

import frugax
from tests.errors import assert_close

b, d, order, theta = 2, 3, 6, 20.0


def system(order, theta):
    """The continuous A, B of the paper, entry by entry, held for one token by scipy."""
    A = np.zeros((order, order))
    for i in range(order):
        for j in range(order):
            A[i, j] = (2 * i + 1) / theta * (-1 if i < j else (-1) ** (i - j + 1))
    B = np.array([[(2 * i + 1) / theta * (-1) ** i] for i in range(order)])
    return scipy.signal.cont2discrete((A, B, np.eye(order), np.zeros((order, 1))), dt=1.0)[:2]


def loop(u, m, segment_ids=None):
    A, B = system(order, theta)
    out = []
    for t in range(u.shape[1]):
        if segment_ids is not None and t > 0:
            m = np.where((segment_ids[:, t] == segment_ids[:, t - 1])[:, None, None], m, 0)
        m = m @ A.T + u[:, t, :, None] * B[:, 0]
        out.append(m)
    return np.stack(out, axis=1), m


def signals(t=45):
    rng = np.random.default_rng(t)
    return rng.standard_normal((b, t, d)), rng.standard_normal((b, d, order))


def run(u, **options):
    return frugax.kernels.lmu(jnp.asarray(u), order, theta, **options)


@pytest.mark.parametrize("method", ["fft", "recurrent"])
@pytest.mark.parametrize("t", [1, 45])
def test_against_a_loop(method, t):
    u, m0 = signals(t)
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype == np.float64):
            got = run(u.astype(dtype), method=method, initial_state=jnp.asarray(m0.astype(dtype)))
            assert_close(got, loop(u.astype(dtype).astype(float), m0.astype(dtype).astype(float)), dtype)
            assert_close(
                run(u.astype(dtype), method=method), loop(u.astype(dtype).astype(float), 0 * m0), dtype
            )


def test_documents():
    u, m0 = signals()
    ids = np.cumsum(np.random.default_rng(0).random((b, 45)) < 0.1, axis=1) % 2
    with jax.enable_x64(True):
        got = run(u, initial_state=jnp.asarray(m0), segment_ids=jnp.asarray(ids))
        assert_close(got, loop(u, m0, ids), "float64")


@pytest.mark.parametrize("method", ["fft", "recurrent"])
def test_chunks_that_carry_the_memory_are_one_call(method):
    u, _ = signals()
    u = u.astype(np.float32)
    first, state = run(u[:, :17], method=method)
    second, state = run(u[:, 17:], method=method, initial_state=state)
    assert_close((jnp.concatenate([first, second], axis=1), state), run(u, method=method), "float32")


@pytest.mark.parametrize("method", ["fft", "recurrent"])
def test_gradients(method):
    """The map is linear: its gradient is its transpose, <w, F v> = <F^T w, v>."""
    u, m0 = signals()
    with jax.enable_x64(True):

        def f(u, m0):
            return run(u, initial_state=m0, method=method)

        (m, state), pullback = jax.vjp(f, jnp.asarray(u), jnp.asarray(m0))
        rng = np.random.default_rng(1)
        w = jnp.asarray(rng.standard_normal(m.shape)), jnp.asarray(rng.standard_normal(state.shape))
        du, dm0 = pullback(w)
        for v in (signals(), (u, 0 * m0), (0 * u, m0)):
            out, last = loop(*v)
            assert_close(
                jnp.vdot(du, v[0]) + jnp.vdot(dm0, v[1]), np.vdot(w[0], out) + np.vdot(w[1], last), "float64"
            )


def test_platforms_take_the_form_that_is_fast_on_them():
    """One program, exported: a loop for CPU, a convolution for TPU; and it has a gradient."""
    u, m0 = signals()

    def f(u, m0):
        return run(u, initial_state=m0)[0].sum()

    arguments = u.astype(np.float32), m0.astype(np.float32)
    for platform, fft in (("cpu", False), ("tpu", True)):
        text = jax.export.export(jax.jit(jax.grad(f)), platforms=[platform])(*arguments).mlir_module()
        assert ("stablehlo.fft" in text) == fft
        assert ("stablehlo.while" in text) != fft


def test_the_memory_is_the_window_and_better_so_with_order():
    """u(t - s) = sum_n P_n((2 s + 1) / theta - 1) m_n, for signals slow enough for the order."""
    theta, t = 60.0, np.arange(400)
    u = np.sin(2 * np.pi * t / 47) + 0.5 * np.cos(2 * np.pi * t / 90)
    back = np.arange(5, 60, 5)
    want = np.stack([u[200 - s : 400 - s] for s in back], axis=1)
    errors = []
    for order in (4, 8, 12):
        m, _ = frugax.kernels.lmu(jnp.asarray(u, jnp.float32)[None, :, None], order, theta)
        read = legendre.legval((2 * back + 1) / theta - 1, np.asarray(m[0, 200:, 0], np.float64).T)
        errors.append(np.sqrt(np.mean((read - want) ** 2) / np.mean(want**2)))
    assert errors[0] > 10 * errors[1] > 50 * errors[2]
    # What stays is the hold: the mean of a sine over one token is less than its middle by omega^2 / 24.
    assert errors[2] < 1.5 * (2 * np.pi / 47) ** 2 / 24


def test_half_precision_has_a_wide_memory():
    u, _ = signals()
    m, state = run(u.astype(jnp.bfloat16))
    assert (m.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(m, loop(np.asarray(u.astype(jnp.bfloat16), float), np.zeros((b, d, order)))[0], "bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": jnp.ones((2, 5))}, r"u: got float32\[2, 5\]; expected floating \[batch, time, channels\]"),
        ({"u": jnp.ones((2, 5, 3), jnp.int32)}, "u: got int32"),
        ({"order": 0}, "order: got 0"),
        ({"theta": 0.0}, "theta: got 0.0"),
        ({"method": "scan"}, "method: got 'scan'; expected 'fft', 'recurrent' or None"),
        ({"initial_state": jnp.ones((2, 3, 5))}, r"initial_state: got .* expected floating \[2, 3, 4\]"),
        ({"segment_ids": jnp.ones((2, 4), jnp.int32)}, r"segment_ids: got .* expected integers \[2, 5\]"),
        (
            {"segment_ids": jnp.ones((2, 5), jnp.int32), "method": "fft"},
            "segment_ids: a convolution knows no",
        ),
    ],
)
def test_names_the_argument(change, message, unchecked_types):
    good = {"u": jnp.ones((2, 5, 3)), "order": 4, "theta": 9.0}
    with pytest.raises(ValueError, match=message):
        frugax.kernels.lmu(**{**good, **change})


def test_example():
    assert doctest.testmod(importlib.import_module("frugax.kernels.lmu")).failed == 0
