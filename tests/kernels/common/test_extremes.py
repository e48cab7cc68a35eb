"""Gates and parameters at the ends of their ranges: values of the limit, and gradients that are finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import kernels
from tests.errors import assert_close

T = 6
BACKENDS = [None, *(pytest.param(b, marks=pytest.mark.full) for b in ("reference", "xla", "pallas_tpu"))]
LEAST = [-1e4, -1e30, -np.inf]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def finite(tree) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@partial(jax.jit, static_argnums=0)
def both_passes(function, floats):
    results, pullback = jax.vjp(lambda floats: function(**floats), floats)
    return results, pullback(jax.tree.map(jnp.ones_like, results))[0]


def with_gradients(function, **floats):
    """Return the results, and the gradient of a sum over them."""
    return both_passes(function, floats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_decays_of_linear_attention(backend, per_channel):
    """A gate that is shut forgets all: the tokens before it are another document."""
    q, k, v = map(jnp.asarray, normal(0, 3, 1, T, 1, 4))
    decay = np.full((1, T, 1, 4) if per_channel else (1, T, 1), -0.1, np.float32)
    call = lambda g, ids=None: kernels.linear_attention(  # noqa: E731
        q, k, v, g, segment_ids=ids, backend=backend
    )
    want = jax.jit(call)(decay, (np.arange(T) >= 3)[None].astype(np.int32))
    for least in LEAST:
        shut = decay.copy()
        shut[:, 3] = least
        got, gradients = with_gradients(call, g=shut)
        assert_close(got, want, "float32")
        assert finite(gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_and_steps_of_selective_scan(backend):
    x, z = map(jnp.asarray, normal(1, 2, 1, T, 3))
    B, C = map(jnp.asarray, normal(2, 2, 1, T, 2))
    rates = np.array([[-1.0, -2.0]] * 3, np.float32)
    raw = np.float32([0.5, -1e4, 1e4, -np.inf, 0.0, -88.0])[None, :, None].repeat(3, 2)

    def call(A, dt, softplus=True):
        return kernels.selective_scan(x, dt, A, B, C, z=z, dt_softplus=softplus, backend=backend)

    got, gradients = with_gradients(call, A=rates, dt=raw)
    assert finite((got, gradients))
    steps = np.float32([0.5, 0.0, 1e-30, 1.0, 0.0, 2.0])[None, :, None].repeat(3, 2)
    plain, most = partial(call, softplus=False), lambda least: np.float32([[-1.0, least]] * 3)
    want, _ = with_gradients(plain, A=most(-1e33), dt=steps)
    for least in LEAST[1:]:
        got, gradients = with_gradients(plain, A=most(least), dt=steps)
        assert finite(gradients)
        if least == -np.inf:
            assert_close(got, want, "float32")


@pytest.mark.parametrize("mamba", [2, 3])
def test_rates_and_steps_of_ssd(mamba):
    x = jnp.asarray(normal(3, 1, T, 2, 3))
    B, C = map(jnp.asarray, normal(4, 2, 1, T, 1, 2))
    dt = np.float32([0.5, 0.0, 1e4, 1e-30, 0.0, 1.0])[None, :, None].repeat(2, 2)

    def call(A, dt):
        if mamba == 2:
            return kernels.ssd(x, dt, A, B, C)
        return kernels.trapezoidal_ssd(x, dt, jnp.broadcast_to(A, dt.shape), B, C, jnp.full_like(dt, 0.3))

    for least in LEAST:
        got, gradients = with_gradients(call, A=np.float32([-1.0, least]), dt=dt)
        assert finite((got, gradients))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cell", "gates"), [("lstm", 4), ("gru", 3), ("elman", 1), ("slstm", 4)])
def test_gates_of_rnn(backend, cell, gates):
    x = np.where(normal(5, 1, T, 1, gates, 2) > 0, 1e4, -1e4).astype(np.float32)
    recurrent = normal(6, 1, gates, 2, 2)
    got, gradients = with_gradients(
        lambda x, R: kernels.rnn(x, R, cell=cell, backend=backend), x=x, R=recurrent
    )
    assert finite((got, gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_beside_what_grows(backend):
    """Products of a's leave the range of float32 within a row, and a zero lets h start again."""
    a = np.float32([1e30, 1e30, 0.0, 1e30, 1e-30, 0.0])[None, :, None]
    b = np.float32([0.0, 1e-30, 1.0, 0.0, 1.0, 1.0])[None, :, None]
    (h, _), gradients = with_gradients(
        lambda a, b: kernels.linear_recurrence(a, b, backend=backend), a=a, b=b
    )
    np.testing.assert_allclose(np.asarray(h)[0, :, 0], [0.0, 1e-30, 1.0, 1e30, 2.0, 1.0], rtol=1e-6)
    assert finite(gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_of_large_sums(backend):
    x = np.float32([1e30, -1e30, 1e4, -1e4, 0.0, 88.0])[None, :, None]
    w = np.float32([[1.0], [1.0]])
    got, gradients = with_gradients(
        lambda x, w: kernels.causal_conv1d(x, w, activation="silu", backend=backend)[0], x=x, w=w
    )
    assert finite(got)
    assert finite(gradients["x"])
