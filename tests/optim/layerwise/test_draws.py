"""The layers that LISA draws and BAdam visits: every one, the last included, as often as it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim

LAYERS = 5


def visits(optimizer, steps):
    """Which layers each step moves [steps, LAYERS]; and those that `active` names before it."""
    params = {"layers": {"w": jnp.ones((LAYERS, 2, 2)), "b": jnp.ones((LAYERS, 2))}, "head": jnp.ones(3)}
    gradient = jax.tree.map(jnp.ones_like, params)

    def step(state, _):
        named = optimizer.active(state, params)
        updates, state = optimizer.update(gradient, state, params)
        moved = [(u != 0).any(tuple(range(1, u.ndim))) for u in updates["layers"].values()]
        return state, (*moved, named)

    w, b, named = jax.jit(lambda s: jax.lax.scan(step, s, None, length=steps)[1])(optimizer.init(params))
    np.testing.assert_array_equal(w, b)  # the same layers in all leaves
    for moved, active in zip(np.asarray(w), np.asarray(named), strict=True):
        np.testing.assert_array_equal(np.flatnonzero(moved), active)
    return np.asarray(w)


@pytest.mark.parametrize("active", [1, 2])
def test_lisa_draws_every_layer_uniformly(active):
    """300 draws: each layer's share is active / LAYERS within five standard errors, pairs are as frequent."""
    moved = visits(optim.lisa(0.1, active=active, update_interval=1, seed=1), 300)
    assert (moved.sum(1) == active).all()
    share = active / LAYERS
    assert (np.abs(moved.mean(0) - share) < 5 * np.sqrt(share * (1 - share) / 300)).all()
    again = (moved[1:] & moved[:-1]).sum(1).mean()  # draws don't depend on the last one
    assert abs(again - active * share) < 5 * np.sqrt(active * share / 300)


def test_lisa_keeps_its_layers_for_an_interval():
    moved = visits(optim.lisa(0.1, active=2, update_interval=7), 70).reshape(10, 7, LAYERS)
    assert (moved == moved[:, :1]).all()
    assert len({m[0].tobytes() for m in moved}) > 3


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
def test_badam_visits_each_layer_once_in_every_round(order):
    moved = visits(optim.badam(0.1, update_interval=3, order=order, rest=optax.identity()), 3 * 8 * LAYERS)
    assert (moved.sum(1) == 1).all()
    turns = moved.argmax(1).reshape(8, LAYERS, 3)
    assert (turns == turns[..., :1]).all()
    rounds = turns[..., 0]
    assert (np.sort(rounds) == np.arange(LAYERS)).all()
    expected = {"ascending": np.arange(LAYERS), "descending": np.arange(LAYERS)[::-1]}
    if order in expected:
        assert (rounds == expected[order]).all()
    else:  # reshuffled: rounds differ, and no layer keeps its place
        assert len({r.tobytes() for r in rounds}) > 5
        assert all(len(set(rounds[:, i])) > 1 for i in range(LAYERS))
