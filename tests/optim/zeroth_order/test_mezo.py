"""MeZO: what a step is, what it needs, and that its log is the run."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import frugax
from frugax.optim import mezo_step
from frugax.optim import zeroth_order as zo
from tests.errors import assert_close, bound, error
from tests.optim.zeroth_order.models import network


def test_a_step_is_the_definition():
    """theta - lr (L(theta + eps z) - L(theta - eps z)) / (2 eps) z, z from jax.random.normal, in float64."""
    rng = np.random.default_rng(0)
    w, goal = rng.standard_normal(50).astype(np.float32), rng.standard_normal(50)
    key = jax.random.key(3)
    z = np.asarray(jax.random.normal(jax.random.fold_in(key, 0), (50,), jnp.float32), np.float64)

    def loss(w, of=np):
        return of.sum((w - goal) ** 2) if of is np else of.sum((w - goal.astype(np.float32)) ** 2)

    slope = (loss(w + 1e-2 * z) - loss(w - 1e-2 * z)) / 2e-2
    new, info = jax.jit(
        lambda w: mezo_step(lambda w: loss(w, jnp), w, key, learning_rate=1e-3, epsilon=1e-2)
    )(jnp.asarray(w))
    # The difference of two losses of about 100 that differ by about 1 has two digits less than a float32.
    assert_close(info.slope, slope, "float32", times=10)
    assert_close(new, w - 1e-3 * slope * z, "float32", times=10)
    np.testing.assert_allclose(info.scalar, -1e-3 * info.slope, rtol=1e-6)


BOTH = [pytest.param("float32", marks=pytest.mark.full), "bfloat16"]


@pytest.mark.parametrize("dtype", BOTH)
def test_parameters_return_to_rounding(dtype):
    """A step of rate zero: each of the three moves rounds once."""
    params, loss = network(dtype=jnp.dtype(dtype))
    after, _ = jax.jit(lambda p: mezo_step(loss, p, jax.random.key(0), learning_rate=0.0, epsilon=1e-3))(
        params
    )
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after, params)
    largest = float(jnp.abs(params["w"]).max()) + 4e-3
    assert 0 < moved["w"] <= 1.5 * largest * float(jnp.finfo(dtype).eps)
    exact, _ = jax.jit(
        lambda p: zo.zo_step(
            loss, p, jax.random.key(0), learning_rate=0.0, estimator=zo.two_point(1e-3, in_place=False)
        )
    )(params)
    chex.assert_trees_all_equal(exact, params)


@pytest.mark.parametrize("dtype", BOTH)
def test_the_log_replays_the_run(dtype):
    """Keys and scalars alone, without data or loss, lead to the same weights to rounding."""
    params, loss = network(dtype=jnp.dtype(dtype))
    keys = jax.random.split(jax.random.key(0), 20)
    step = jax.jit(lambda p, key: mezo_step(loss, p, key, learning_rate=1e-2, epsilon=1e-3))
    trained, scalars = params, []
    for key in keys:
        trained, info = step(trained, key)
        scalars.append(info.scalar)
    again = jax.jit(lambda p, k, s: zo.replay(p, k, s, epsilon=1e-3))(params, keys, jnp.stack(scalars))
    assert_close(again, trained, dtype)
    assert error(params["w"], trained["w"]) > 3 * bound(dtype)


def test_a_step_needs_what_a_forward_pass_needs():
    """Temporaries of step and loss, donated parameters of 16 MB: nothing of a leaf's size, no residuals."""
    params, loss = network(layers=16, width=512)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def temporaries(f, **donate):
        return (
            jax.jit(f, **donate)
            .lower(shapes, jax.random.key(0))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    forward = temporaries(lambda p, key: loss(p))
    step = temporaries(
        lambda p, key: mezo_step(loss, p, key, learning_rate=1e-2, epsilon=1e-3), donate_argnums=0
    )
    assert step < forward + 2**16
    assert temporaries(lambda p, key: jax.grad(loss)(p)) > forward + 2**19  # the bound would notice


def test_a_part_alone_and_an_accuracy_alone():
    """PEFT's case: only biases move. And the objective need not be differentiable."""
    params, _ = network()
    target = jnp.sign(jax.random.normal(jax.random.key(5), (64,)))

    def mistakes(p):
        return jnp.mean(jnp.sign(p["b"]) != target)

    @jax.jit
    def run(params):
        def step(p, key):
            only = zo.only(lambda path: path == "b")
            return mezo_step(mistakes, p, key, learning_rate=0.02, epsilon=0.1, direction=only)

        return jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 2000))

    after, info = run(params)
    np.testing.assert_array_equal(after["w"], params["w"])
    assert info.loss[-100:].mean() < 0.6 * info.loss[:100].mean()


@pytest.mark.full
def test_fine_tuning_a_classifier():
    """A small classifier, pretrained by gradients, learns a shifted task by forward passes alone."""

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.gelu(nn.Dense(32)(x)))

    module = Classifier()
    centres = jax.random.normal(jax.random.key(0), (4, 16))
    shift = 2 * jax.random.normal(jax.random.key(7), (16,))

    def batch(key, shifted):
        labels = jax.random.randint(key, (64,), 0, 4)
        x = centres[labels] + shifted * shift + 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (64, 16))
        return x, labels

    def loss(params, x, labels):
        return -jnp.mean(jax.nn.log_softmax(module.apply(params, x))[jnp.arange(64), labels])

    @jax.jit
    def run():
        params = module.init(jax.random.key(1), jnp.zeros((1, 16)))

        def pretrain(p, key):
            return jax.tree.map(lambda p, g: p - 0.1 * g, p, jax.grad(loss)(p, *batch(key, 0.0))), None

        params, _ = jax.lax.scan(pretrain, params, jax.random.split(jax.random.key(2), 200))
        before = loss(params, *batch(jax.random.key(9), 1.0))

        def tune(p, key):
            data = batch(key, 1.0)
            p, info = mezo_step(lambda p: loss(p, *data), p, key, learning_rate=2e-3, epsilon=1e-3)
            return p, info.loss

        params, losses = jax.lax.scan(tune, params, jax.random.split(jax.random.key(3), 1500))
        return before, loss(params, *batch(jax.random.key(9), 1.0)), losses

    before, after, losses = run()
    assert after < 0.3 * before
    assert losses[-50:].mean() < losses[:50].mean()


def test_the_public_name():
    assert frugax.optim.mezo_step is zo.mezo_step
