"""Estimates of the gradient against the gradient: means, variances, and noise that is jax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from frugax.optim import zeroth_order as zo
from frugax.optim.zeroth_order.noise import normal_like

ESTIMATORS = {
    "two_point": zo.two_point(1e-3, in_place=False),
    "in_place": zo.two_point(1e-3),
    "forward_gradient": zo.forward_gradient(),
}


def quadratic(d=10):
    """Parameters in two leaves, a loss with a known gradient there, and that gradient."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((d, d))
    a = (a @ a.T / d).astype(np.float32)
    params = {"b": jnp.asarray(rng.standard_normal(3), jnp.float32),
              "w": jnp.asarray(rng.standard_normal(d - 3), jnp.float32)}  # fmt: skip

    def loss(p):
        x = jnp.concatenate([p["b"], p["w"]])
        return 0.5 * x @ a @ x

    return params, loss, jax.grad(loss)(params)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


@pytest.mark.parametrize("shape", [(), (1,), (37, 5), (2, 3, 129)])
def test_noise_is_jax_random_normal(shape):
    for seed in (0, 2**40 + 7):
        key = jax.random.key(seed)
        got = jax.jit(normal_like)(key, jnp.zeros(shape, jnp.bfloat16))
        np.testing.assert_array_equal(got, jax.random.normal(key, shape, jnp.float32))


def test_leaves_have_noise_of_their_own():
    moved = zo.displace({"a": jnp.zeros(1000), "b": jnp.zeros(1000)}, jax.random.key(0), 1.0)
    assert abs(np.corrcoef(moved["a"], moved["b"])[0, 1]) < 0.1
    untouched = zo.displace({"i": jnp.arange(3)}, jax.random.key(0), 1.0)
    assert untouched["i"].tolist() == [0, 1, 2]


REST = [pytest.param(name, marks=pytest.mark.full) for name in ("forward_gradient", "in_place")]


@pytest.mark.parametrize("name", ["two_point", *REST])
def test_the_mean_is_the_gradient_with_the_variance_of_theory(name):
    """z z^T g has mean g and covariance |g|^2 I + g g^T: the mean of n lies within its standard error."""
    params, loss, gradient = quadratic()
    n = 4000

    def one(key):
        return zo.zo_gradient(loss, params, key, estimator=ESTIMATORS[name])[0]

    draws = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(1), n))
    draws = np.concatenate([np.reshape(x, (n, -1)) for x in jax.tree.leaves(draws)], axis=1, dtype=np.float64)
    g = flat(gradient)
    variance = g @ g + g**2
    assert (np.abs(draws.mean(0) - g) < 5 * np.sqrt(variance / n)).all()
    # A fourth moment of Gaussians bounds how far a variance of n draws strays; a tenth is five of its errors.
    np.testing.assert_allclose(draws.var(0).sum(), variance.sum(), rtol=0.15)


def test_samples_are_averaged():
    params, loss, gradient = quadratic()
    estimate, value = jax.jit(
        lambda key: zo.zo_gradient(loss, params, key, estimator=ESTIMATORS["forward_gradient"], samples=2000)
    )(jax.random.key(0))
    g = flat(gradient)
    assert (np.abs(flat(estimate) - g) < 5 * np.sqrt((g @ g + g**2) / 2000)).all()
    np.testing.assert_allclose(value, loss(params), rtol=1e-4)


OPTIMIZERS = {
    "sgd": optax.sgd(0.05),
    "sign": optax.sign_sgd(0.02),
    "momentum": optax.sgd(0.01, momentum=0.9),
    "adam": optax.adam(0.05),
}
PAIRS = [(tx, name) for tx in OPTIMIZERS for name in ("two_point", "forward_gradient")]
FIRST = [("adam", "two_point"), ("sign", "forward_gradient")]


@pytest.mark.parametrize(
    ("tx", "name"),
    [pytest.param(*p, marks=[] if p in FIRST else pytest.mark.full) for p in PAIRS],
)
def test_every_optimizer_of_the_benchmark_descends(tx, name):
    (params, loss, _), tx = quadratic(), OPTIMIZERS[tx]

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            gradient, _ = zo.zo_gradient(loss, params, key, estimator=ESTIMATORS[name])
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (params, tx.init(params))
        return jax.lax.scan(step, carry, jax.random.split(jax.random.key(0), 400))[0][0]

    assert loss(run(params)) < 0.1 * loss(params)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
    params, loss, _ = quadratic()
    with pytest.raises(ValueError, match="epsilon: got 0"):
        zo.two_point(0)
    with pytest.raises(ValueError, match="samples: got 0"):
        zo.zo_gradient(loss, params, jax.random.key(0), estimator=ESTIMATORS["two_point"], samples=0)
    with pytest.raises(ValueError, match="density: got 2"):
        zo.magnitude_thresholds(params, 2)
    with pytest.raises(ValueError, match="no scales"):
        zo.qzo_step(loss, params, jax.random.key(0), learning_rate=0.1, epsilon=1e-3)
    with pytest.raises(ValueError, match="window: got 1"):
        zo.history_subspace(1, 0.5)
    with pytest.raises(ValueError, match=r"fewer than 2\^32"):
        jax.eval_shape(frugax.optim.zeroth_order.noise.normal_like, jax.random.key(0), big())


def big():
    return jax.ShapeDtypeStruct((2**17, 2**16), jnp.bfloat16)
