"""SlimFit's schedule against the rule, replayed in NumPy, and at its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from tests.errors import assert_close
from tests.optim.optimizers import gradients

W = np.random.default_rng(0).normal(size=(4, 3, 2))
G = gradients((4, 3, 2), 20)
TREE = {"layers": {"a": jnp.asarray(W, jnp.float32), "b": 3 * jnp.ones((4, 5))}, "head": jnp.ones(3)}


def run(opt, steps):
    def step(carry, g):
        tree, state = carry
        gradient = {"layers": {"a": g, "b": jnp.sin(tree["layers"]["b"])}, "head": tree["head"]}
        updates, state = opt.update(gradient, state, tree)
        return (optax.apply_updates(tree, updates), state), optax.apply_updates(tree, updates)

    return jax.jit(lambda g: jax.lax.scan(step, (TREE, opt.init(TREE)), g)[1])(
        jnp.asarray(G[:steps], jnp.float32)
    )


def test_nothing_frozen_is_fine_tuning():
    inner = optax.adamw(0.1, weight_decay=0.1)
    assert_close(run(optim.slimfit(inner, 0.0), 10), run(inner, 10), "float32")


def test_the_layers_that_moved_least_rest():
    path = run(optim.slimfit(optax.sgd(0.1), 0.5), 20)
    both = np.concatenate([np.asarray(path["layers"][n]).reshape(20, 4, -1).sum(-1) for n in "ab"], axis=1)
    before = np.concatenate([np.asarray(TREE["layers"][n]).reshape(4, -1).sum(-1) for n in "ab"])
    weights = [[*W], [*np.full((4, 5), 3.0)]]
    distance, turns = np.full(8, np.inf), np.zeros(8)
    for t in range(20):
        active = np.zeros(8, bool)
        active[np.argsort(-distance, kind="stable")[:4]] = True
        np.testing.assert_array_equal(both[t] != before, active)  # the others keep every bit
        before = both[t]
        for i in np.flatnonzero(active):
            w = weights[i // 4][i % 4]
            u = -0.1 * (G[t][i] if i < 4 else np.sin(w))
            distance[i] = np.linalg.norm(u) / np.linalg.norm(w)
            weights[i // 4][i % 4] = w + u
        turns += active
    assert (turns > 0).all()
    assert turns.max() > turns.min()


def test_what_always_trains_and_what_is_missing():
    opt = optim.slimfit(optax.sgd(0.1), 1.0)
    updates, _ = jax.jit(opt.update)(TREE, opt.init(TREE), TREE)
    assert not np.asarray(updates["layers"]["a"]).any()
    assert_close(updates["head"], -0.1 * np.ones(3), "float32")
    with pytest.raises(ValueError, match="params: got None"):
        opt.update(TREE, opt.init(TREE))
    with pytest.raises(ValueError, match="matches no leaf"):
        optim.slimfit(optax.sgd(0.1), 0.5, layers="blocks").init(TREE)
