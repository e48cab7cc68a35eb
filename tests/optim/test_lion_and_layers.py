"""Lion-K, LISA and BAdam against their papers' algorithms, written out in NumPy, float64, over 50 steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from tests.errors import assert_close
from tests.optim.definitions import EVERY, RATE, STEPS, Adam, ours
from tests.optim.optimizers import gradients

KAPPAS = {
    "l1": ("l1", lambda u: np.abs(u).sum()),
    "l2": ("l2", lambda u: np.linalg.norm(u)),
    "group": ("group", lambda u: np.linalg.norm(u, axis=0).sum()),
    "lp": (optim.kappas.lp(3.0), lambda u: (np.abs(u) ** 3).sum() ** (1 / 3)),
    "huber": (
        optim.kappas.huber(0.5),
        lambda u: np.where(np.abs(u) < 0.5, u * u, np.abs(u) - 0.25).sum(),
    ),
}


def numerical_gradient(f, u, h=1e-6):
    grad = np.zeros_like(u)
    for i in np.ndindex(u.shape):
        e = np.zeros_like(u)
        e[i] = h
        grad[i] = (f(u + e) - f(u - e)) / (2 * h)
    return grad


@pytest.mark.parametrize("name", sorted(KAPPAS))
def test_lion_k(name):
    kappa, value = KAPPAS[name]
    g, M, expected = gradients((3, 4), STEPS), 0, []
    w = np.random.default_rng(1).normal(size=(3, 4))
    for G in g:
        expected.append(-RATE * (numerical_gradient(value, 0.9 * M + 0.1 * G) + 0.1 * w))
        M = 0.99 * M + 0.01 * G
    got = ours(lambda: optim.lion_k(RATE, kappa, weight_decay=0.1), g, w=w)
    np.testing.assert_allclose(got, np.stack(expected), atol=RATE * 1e-4)  # of central differences


@pytest.mark.parametrize("name", sorted(set(KAPPAS) - {"l1"}))  # l1's steps don't vanish: see its box
def test_lion_k_solves_its_constrained_problem(name):
    """On f(w) = |w - target|^2 / 2: where it ends, decay w = grad kappa(-grad f); and on its way there
    H = f + kappa*(decay w) / decay + b1 / (1 + decay e) (kappa*(decay w) + kappa(M) - decay <M, w>) falls.

    It starts inside of the ball, where a norm's kappa* is 0; Huber's is delta |y|^2 / 2 in its box. M is the
    momentum of -grad f. In the paper's continuous time its pace is (1 - b2) / rate = 1, and e = 1 - b1.
    """
    kappa, value = KAPPAS[name]
    target, rate, decay, b1 = np.array([[3.0, -0.4, 2.0], [0.2, -5.0, 1.0]]), 1e-3, 0.7, 0.9
    with jax.enable_x64(True):
        opt = optim.lion_k(rate, kappa, b1=b1, b2=1 - rate, weight_decay=decay)

        def step(carry, _):
            w, state = carry
            updates, state = opt.update(w - target, state, w)
            return (w + updates, state), (w, -state[0].mu)

        start = jnp.zeros((2, 3))
        run = jax.jit(lambda w: jax.lax.scan(step, (w, opt.init(w)), None, length=20_000)[1])
        path, momentum = (np.asarray(x)[::500] for x in run(start))
    end = path[-1]
    np.testing.assert_allclose(decay * end, numerical_gradient(value, target - end), atol=rate)
    assert np.abs(end - target).max() > 0.1  # the constraint binds
    conjugate = (lambda y: 0.25 * np.sum(y * y)) if name == "huber" else (lambda y: 0.0)

    def lyapunov(w, m):
        f = 0.5 * np.sum((w - target) ** 2)
        held = conjugate(decay * w)
        return f + held / decay + b1 / (1 + decay * (1 - b1)) * (held + value(m) - decay * np.sum(m * w))

    H = [lyapunov(w, m) for w, m in zip(path[1:], momentum[1:], strict=True)]
    assert (np.diff(H) <= 0).all()
    assert H[0] - H[-1] > 1


def test_lion_is_optax_lion():
    g = gradients((3, 4), STEPS)
    np.testing.assert_array_equal(
        ours(lambda: optim.lion(RATE, weight_decay=0.1), g),
        ours(lambda: optax.lion(RATE, weight_decay=0.1), g),
    )


def test_lion_stays_in_its_box():
    """min |w - target|^2 over |w| <= 1 / decay is the target clipped; a step in shrinks what is outside."""
    target, rate, decay = np.array([[3.0, -0.4], [0.2, -5.0]]), 1e-3, 1.0
    with jax.enable_x64(True):
        opt = optim.lion(rate, weight_decay=decay)

        def step(carry, _):
            w, state = carry
            updates, state = opt.update(w - target, state, w)
            return (w + updates, state), w

        start = jnp.full((2, 2), 4.0)
        path = np.asarray(
            jax.jit(lambda w: jax.lax.scan(step, (w, opt.init(w)), None, length=6000)[1])(start)
        )
    outside = np.maximum(np.abs(path) - 1 / decay, 0)
    assert (outside[1:] <= (1 - rate * decay) * outside[:-1] + 1e-12).all()
    np.testing.assert_allclose(path[-1], np.clip(target, -1, 1), atol=20 * rate)


def test_lisa():
    """Adam on the drawn layers with fresh moments at each draw; the others keep every bit, decay included."""
    layers, opt = 4, optim.lisa(RATE, active=2, update_interval=EVERY, weight_decay=0.1)
    g, h = gradients((layers, 3, 2), STEPS), gradients((5,), STEPS, seed=1)
    w = np.ones((layers, 3, 2))
    with jax.enable_x64(True):
        params = {"layers": {"kernel": jnp.asarray(w)}, "head": jnp.zeros(5)}

        def step(state, gh):
            updates, state = opt.update({"layers": {"kernel": gh[0]}, "head": gh[1]}, state, params)
            return state, (updates["layers"]["kernel"], updates["head"])

        got = jax.jit(lambda gh: jax.lax.scan(step, opt.init(params), gh)[1])(
            (jnp.asarray(g), jnp.asarray(h))
        )
    expected, adam_of_head, draws = [], Adam(), set()
    for t, G in enumerate(g):
        if t % EVERY == 0:
            active = np.abs(np.asarray(got[0][t])).sum(axis=(1, 2)) > 0
            draws.add(active.tobytes())
            assert active.sum() == 2
            adam = Adam()
        expected.append(-RATE * active[:, None, None] * (adam(G) + 0.1 * w))
    assert len(draws) > 2
    assert_close(got[0], np.stack(expected), "float64")
    assert_close(got[1], np.stack([-RATE * adam_of_head(H) for H in h]), "float64")


def test_badam():
    """Adam on one layer after the other, from the first on, with fresh moments; all else is frozen."""
    g, w = gradients((3, 2, 4), STEPS), np.ones((3, 2, 4))
    expected = []
    for t, G in enumerate(g):
        if t % EVERY == 0:
            adam, active = Adam(), np.arange(3)[:, None, None] == t // EVERY % 3
        expected.append(-RATE * active * (adam(G) + 0.1 * w))
    with jax.enable_x64(True):
        opt = optim.badam(RATE, update_interval=EVERY, weight_decay=0.1)
        params = {"layers": {"w": jnp.asarray(w)}, "head": jnp.ones(4)}

        def step(state, g):
            updates, state = opt.update({"layers": {"w": g}, "head": g[0, 0]}, state, params)
            return state, (updates["layers"]["w"], updates["head"])

        layers, head = jax.jit(lambda g: jax.lax.scan(step, opt.init(params), g)[1])(jnp.asarray(g))
    assert_close(layers, np.stack(expected), "float64")
    assert not np.asarray(head).any()


def test_lisa_of_all_layers_is_adamw():
    g = gradients((3, 2, 4), 20)
    spec = lambda make: ours_in_layers(make, g)  # noqa: E731
    every = spec(lambda: optim.lisa(RATE, active=3, update_interval=4, moments="keep", weight_decay=0.1))
    assert_close(every, spec(lambda: optax.adamw(RATE, weight_decay=0.1)), "float64")


def ours_in_layers(make, g):
    with jax.enable_x64(True):
        opt, params = make(), {"layers": {"w": jnp.ones(g.shape[1:])}}

        def step(state, g):
            updates, state = opt.update({"layers": {"w": g}}, state, params)
            return state, updates["layers"]["w"]

        return np.asarray(jax.jit(lambda g: jax.lax.scan(step, opt.init(params), g)[1])(jnp.asarray(g)))
