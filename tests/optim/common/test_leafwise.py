"""A transformation is traced once for leaves of a shape, closes over traced values, takes any container."""

from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

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


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    ("params", "paths"),
    [
        ([{"w": jnp.ones((4, 6))}, None, jnp.ones(6)], ["0/w", "2"]),
        ((jnp.ones(3), Pair({"kernel": jnp.ones((4, 6))}, optax.MaskedNode())), ["0", "1/first/kernel"]),
        (jnp.ones((32, 40)), [""]),
        (flax.core.freeze({"a/b": {"w": jnp.ones((2, 4, 6))}}), ["a/b/w"]),
        ({"w": nnx.Param(jnp.ones((4, 6))), "b": nn.Partitioned(jnp.ones(6), ("x",))}, ["b", "w"]),
    ],
    ids=["list", "tuples", "array", "frozen", "boxes"],
)
def test_params_in_any_container(params, paths):
    """Updates come in the container of params, states in dicts by path, without boxes."""
    rule = optim.galore(1e-2, rank=2)
    assert [d.path for d in optim.MatrixSpec().decisions(params)] == paths
    state = jax.eval_shape(rule.init, params)
    updates, after = jax.eval_shape(rule.update, params, state, params)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shapes(updates) == shapes(params)
    assert shapes(after) == shapes(state)
    held = {key for path, _ in jax.tree_util.tree_leaves_with_path(state[0].leaves) for key in path}
    assert not any(isinstance(key, jax.tree_util.SequenceKey) for key in held)


def test_params_without_a_leaf_of_the_gradients():
    rule, g = optim.galore(1e-2, rank=2), {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    with pytest.raises(ValueError, match=r"params: got nothing at b; expected \[6\]"):
        rule.update(g, rule.init(g), {"w": g["w"]})
    with pytest.raises(ValueError, match=r"state: got nothing at .* for w; expected"):
        rule.update(g, rule.init({"v": {"w": g["w"]}, "b": g["b"]}), g)
