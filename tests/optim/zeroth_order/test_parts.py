"""Block-wise and hybrid steps, and ZOODiP's timesteps, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax.optim import zeroth_order as zo
from tests.errors import assert_close

RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.standard_normal(4), jnp.float32) for name in ("a1", "a2", "b", "still")}
BLOCKS = [lambda path: path.startswith("a"), lambda path: path == "b"]
KEY = jax.random.key(5)


def loss(p):
    return jnp.sum((p["a1"] * p["a2"] - p["b"]) ** 2) + jnp.sum(p["b"] ** 2 + p["still"])


def directions():
    keys = {name: jax.random.fold_in(KEY, i) for i, name in enumerate(sorted(PARAMS))}
    return {n: np.asarray(jax.random.normal(k, (4,), jnp.float32), np.float64) for n, k in keys.items()}


def exact_slope(params, names):
    gradient, z = jax.grad(loss)(params), directions()
    return sum(float(np.asarray(gradient[n], np.float64) @ z[n]) for n in names)


@pytest.mark.parametrize("at_once", [False, True])
def test_each_block_moves_along_its_own_slope(at_once):
    """All slopes at the same params, or each at those that the block before left."""
    new, info = jax.jit(
        lambda p: zo.blockwise_step(
            loss, p, KEY, blocks=BLOCKS, learning_rate=0.05, epsilon=1e-2, at_once=at_once
        )
    )(PARAMS)
    now, want, z = dict(PARAMS), dict(PARAMS), directions()
    for b, names in enumerate((("a1", "a2"), ("b",))):
        slope = exact_slope(PARAMS if at_once else now, names)
        assert abs(info.slope[b] - slope) < 2e-3 * abs(slope)  # the loss is of fourth degree
        for name in names:
            want[name] = now[name] = now[name] - 0.05 * float(info.slope[b]) * z[name]
    assert_close(new, want, "float32")
    assert abs(exact_slope(PARAMS, ("b",)) - exact_slope(now | {"b": PARAMS["b"]}, ("b",))) > 0.1


def test_a_hybrid_step_is_the_optimizers_and_mezos():
    tx, where = optax.adam(0.1), lambda path: path == "b"
    state = tx.init(zo.first_order_part(PARAMS, where))
    new, after, info = jax.jit(
        lambda p, s: zo.hybrid_step(
            loss, p, KEY, tx, s, first_order=where, learning_rate=0.02, estimator=zo.forward_gradient()
        )
    )(PARAMS, state)
    updates, want_state = tx.update({"b": jax.grad(loss)(PARAMS)["b"]}, state)
    others = ("a1", "a2", "still")
    assert_close(info.slope, exact_slope(PARAMS, others), "float32")
    want = {n: PARAMS[n] - 0.02 * float(info.slope) * directions()[n] for n in others}
    assert_close(new, want | {"b": PARAMS["b"] + updates["b"]}, "float32")
    assert_close(after[0].mu, want_state[0].mu, "float32")


def test_hybrid_training_keeps_no_activations_of_the_first_layers():
    """Backpropagation ends at the head: temporaries of a step are a fraction of all gradients'."""
    w = jnp.ones((12, 64, 64)) / 64
    params, x = {"body": w, "head": jnp.ones((64, 1))}, jnp.ones((256, 64))

    def loss(p):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["body"])
        return jnp.mean((h @ p["head"]) ** 2)

    tx, where = optax.sgd(0.1), lambda path: path == "head"
    hybrid = lambda p: zo.hybrid_step(  # noqa: E731
        loss, p, KEY, tx, tx.init(zo.first_order_part(p, where)), first_order=where, learning_rate=0.1,
        estimator=zo.two_point(1e-3, in_place=False),
    )  # fmt: skip
    size = lambda f: jax.jit(f).lower(params).compile().memory_analysis().temp_size_in_bytes  # noqa: E731
    assert size(hybrid) < 0.4 * size(jax.grad(loss))


def test_timesteps_are_uniform_over_their_part():
    """The authors' part, 0.5 to 0.9, or one of the caller's."""
    for part, ends in (({}, (50, 90)), ({"low": 0.25, "high": 0.75}, (25, 75))):
        t = zo.partial_timesteps(KEY, (20_000,), steps=100, **part)
        counts = np.bincount(np.asarray(t), minlength=100)
        inside = counts[slice(*ends)]
        assert inside.sum() == 20_000
        expected = 20_000 / len(inside)
        assert (np.abs(inside - expected) < 5 * expected**0.5).all()


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
    step = dict(learning_rate=0.1, epsilon=1e-3)
    with pytest.raises(ValueError, match="the direction moves none"):
        zo.blockwise_step(loss, PARAMS, KEY, blocks=[*BLOCKS, lambda path: path == "c"], **step)
    with pytest.raises(ValueError, match="first_order: got no leaf"):
        zo.hybrid_step(loss, PARAMS, KEY, optax.sgd(0.1), None, first_order=lambda path: False,
                       learning_rate=0.1, estimator=zo.forward_gradient())  # fmt: skip
    with pytest.raises(ValueError, match=r"low, high: got 0.9 and 0.5"):
        zo.partial_timesteps(KEY, (2,), low=0.9, high=0.5)
    tx = zo.history_subspace(2, 0.5)
    with pytest.raises(ValueError, match="got complex leaves"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2, jnp.complex64))
