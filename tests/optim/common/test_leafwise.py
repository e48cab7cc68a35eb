"""A transformation is traced once for leaves of a shape, and may close over traced values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from frugax import optim


def counted(calls):
    """Adam that notes the shape that each of its updates is traced for."""
    adam = optax.scale_by_adam()

    def update(updates, state, params=None):
        calls.append(updates.shape)
        return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def test_leaves_of_one_shape_share_a_trace():
    calls = []
    rule = optim.low_rank(optim.Gram(2), counted(calls))
    layer = {"up": {"kernel": jnp.ones((4, 6))}, "down": {"kernel": jnp.ones((6, 4))}, "bias": jnp.ones(6)}
    params = {f"layer_{i}": layer for i in range(5)}
    state = rule.init(params)
    for _ in range(2):  # two functions: the second is traced anew
        jax.eval_shape(lambda: rule.update(params, state, params))
    assert sorted(calls) == [(2, 6), (2, 6), (6,)]  # up, down (transposed), bias


def test_leaves_that_share_a_trace_draw_their_own_projections():
    rule = optim.low_rank(optim.Gaussian(2), optax.identity())
    g = {name: {"kernel": jnp.ones((4, 6))} for name in "ab"}
    updates, _ = rule.update(g, rule.init(g), g)
    assert not np.allclose(updates["a"]["kernel"], updates["b"]["kernel"])


def test_a_traced_argument_in_two_loops():
    """Both loops close over the same traced scale: the trace that they share must not keep a loop's own."""
    g = {name: {"kernel": jnp.arange(24.0).reshape(4, 6)} for name in "ab"}

    def steps(scale):
        rule = optim.low_rank(optim.SVD(2), optax.scale_by_adam(), scale=scale)

        def body(state, _):
            updates, state = rule.update(g, state)
            return state, updates

        state, first = jax.lax.scan(body, rule.init(g), length=2)
        _, second = jax.lax.scan(body, state, length=3)
        return first, second

    traced, constant = jax.jit(steps)(0.5), jax.jit(lambda: steps(0.5))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), traced, constant)
