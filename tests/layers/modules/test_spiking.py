"""Spikes and integrate-and-fire neurons against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close


def test_the_derivative_of_a_spike_is_the_surrogates():
    with jax.enable_x64(True):
        x = jnp.linspace(-2, 2, 41)
        s = 1 / (1 + np.exp(-4 * np.asarray(x)))
        assert (np.asarray(frugax.layers.spike(x)) == (np.asarray(x) >= 0)).all()
        first = jax.vmap(jax.grad(frugax.layers.spike))
        assert_close(first(x), 4 * s * (1 - s), "float64")
        _, forward = jax.jvp(frugax.layers.spike, (x,), (jnp.full_like(x, 3.0),))
        assert_close(forward, 12 * s * (1 - s), "float64")
        second = jax.vmap(jax.grad(jax.grad(frugax.layers.spike)))(x)
        assert_close(second, 16 * s * (1 - s) * (1 - 2 * s), "float64")


def loop(x, v, starts, tau, threshold):
    """Spikes, the last potentials, and each token's potential before its reset, one neuron at a time."""
    spikes, before_reset = np.zeros_like(x), np.zeros_like(x)
    v = v.copy()
    for b, t, d in np.ndindex(*x.shape):
        if starts[b, t]:
            v[b, d] = 0
        v[b, d] += (x[b, t, d] - v[b, d]) / tau
        before_reset[b, t, d] = v[b, d]
        if v[b, d] >= threshold:
            spikes[b, t, d], v[b, d] = 1, 0
    return spikes, v, before_reset


def test_neurons_are_the_equation_and_its_gradient():
    """The gradient by hand: backwards over time, it ends at each spike and at each document's start."""
    rng = np.random.default_rng(0)
    x, v0 = rng.normal(0.7, 1.0, (2, 17, 3)), rng.standard_normal((2, 3)) / 2
    ids = np.array([np.repeat([4, 9, 4], [5, 1, 11]), np.repeat([1, 1, 0], [5, 1, 11])])
    starts = np.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    tau, threshold = 1.6, 0.8
    spikes, v, u = loop(x, v0, starts, tau, threshold)
    assert 0.1 < spikes.mean() < 0.6
    of_spikes, of_v = rng.standard_normal(x.shape), rng.standard_normal(v.shape)

    s = 1 / (1 + np.exp(-4 * (u - threshold)))
    grad, back = np.zeros_like(x), of_v.copy()
    for t in reversed(range(x.shape[1])):
        here = back * (1 - spikes[:, t]) + of_spikes[:, t] * (4 * s * (1 - s))[:, t]
        grad[:, t] = here / tau
        back = here * (1 - 1 / tau) * ~starts[:, t, None]

    with jax.enable_x64(True):

        def run(x, v0):
            return frugax.layers.lif(
                x, tau=tau, threshold=threshold, initial_state=v0, segment_ids=jnp.asarray(ids)
            )

        out, pull = jax.vjp(run, jnp.asarray(x), jnp.asarray(v0))
        assert_close(out, (spikes, v), "float64")
        assert_close(pull((jnp.asarray(of_spikes), jnp.asarray(of_v))), (grad, back), "float64")


def test_a_stream_is_the_whole():
    x = jax.random.normal(jax.random.key(0), (2, 11, 3)) + 1
    want = frugax.layers.lif(x)
    first, v = frugax.layers.lif(x[:, :4])
    second, v = frugax.layers.lif(x[:, 4:], initial_state=v)
    assert_close((jnp.concatenate([first, second], axis=1), v), want, "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0.5}, "tau: got 0.5"),
        ({"threshold": 0.0}, "threshold: got 0.0"),
        (
            {"initial_state": jnp.ones((2, 4), jnp.float32)},
            r"initial_state: got float32\[2, 4\]; expected floating \[2, 3\]",
        ),
        (
            {"segment_ids": jnp.ones((2, 6), jnp.int32)},
            r"segment_ids: got int32\[2, 6\]; expected integers \[2, 5\]",
        ),
        ({"x": jnp.ones((2, 5), jnp.float32)}, r"x: got float32\[2, 5\]"),
    ],
)
def test_bad_input(arguments, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        frugax.layers.lif(**({"x": jnp.ones((2, 5, 3))} | arguments))
