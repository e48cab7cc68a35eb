"""Layers with fewer experts, and with those of several checkpoints, against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax import moe
from tests.errors import assert_close

D, E, T = 8, 5, 23
X = jax.random.normal(jax.random.key(0), (1, T, D))


def layer(experts, k, **more):
    return frugax.layers.MoE(
        experts=experts, k=k, expert="MLP", expand=2, activation="relu", dispatch="dense", **more
    )


@functools.cache
def initialize(experts, **more):
    return jax.jit(layer(experts, 2, **more).init)


@functools.cache
def params(seed, experts=E, **more):
    init = initialize(experts, **more)(jax.random.key(seed), X)["params"]
    return init | {"router": jax.tree.map(lambda x: 5 * x, init["router"])}


def definition(params, k) -> np.ndarray:
    """Each token's k likeliest experts, by the softmax over their logits."""
    x, p = np.asarray(X[0], np.float64), jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    logits = x @ p["router"]["kernel"]
    y = np.zeros((T, D))
    for t in range(T):
        best = np.argsort(-logits[t])[:k]
        share = np.exp(logits[t, best]) / np.exp(logits[t, best]).sum()
        for e, w in zip(best, share, strict=True):
            hidden = np.maximum(x[t] @ p["experts"]["in"]["kernel"][e], 0)
            y[t] += w * (hidden @ p["experts"]["out"]["kernel"][e])
    return y


@functools.cache
def applied(experts, k, **more):
    return jax.jit(layer(experts, k, **more).apply)


def apply(params, k, **more):
    return applied(params["router"]["kernel"].shape[-1], k, **more)({"params": params}, X)[0]


def test_pruning_keeps_the_most_used():
    """The function is the definition's over those left, and is the same where the others had no token."""
    full = params(1)
    load = jnp.array([0.1, 0.3, 0.2, 0.35, 0.05])
    prune = jax.jit(moe.prune_experts, static_argnums=2)
    small, kept = prune(full, load, 3)
    assert kept.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(
        small["experts"]["out"]["kernel"], np.asarray(full["experts"]["out"]["kernel"])[1:4]
    )
    assert_close(apply(small, 2), definition(small, 2), "float32")
    # Experts 0 and 3 turn all tokens away: the load says so, and without them nothing changes.
    x = np.array(X)
    x[..., 0] = 1
    router = np.array(full["router"]["kernel"])
    router[0] = [-50, 0, 0, -50, 0]
    full = full | {"router": {"kernel": jnp.asarray(router)}}
    whole, sown = jax.jit(lambda p, x: layer(E, 2).apply({"params": p}, x, mutable=["moe"]))(full, x)
    small, kept = prune(full, sown["moe"]["statistics"]["routing"].load, 3)
    assert kept.tolist() == [1, 2, 4]
    assert_close(jax.jit(layer(3, 2).apply)({"params": small}, x), whole, "float32")


@pytest.mark.full
def test_packed_experts_are_pruned_packed():
    full, load = params(1), jnp.array([0.1, 0.3, 0.2, 0.35, 0.05])
    packed, _ = frugax.quant.quantize_params(full, {"experts": "int4"})
    small, _ = moe.prune_experts(packed, load, 2)
    want, _ = frugax.quant.quantize_params(moe.prune_experts(full, load, 2)[0], {"experts": "int4"})
    got = jax.tree.leaves(small)
    assert len(got) == len(jax.tree.leaves(want)) > len(jax.tree.leaves(full))
    for a, b in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_aggregation_is_all_experts_under_one_softmax():
    first, second = params(1), params(2, experts=3)
    both = moe.aggregate_experts([first, second])
    assert both["router"]["kernel"].shape == (D, E + 3)
    want = definition(both, 2)
    assert_close(apply(both, 2), want, "float32")
    # Each token's best expert is the better of the two checkpoints' best.
    x = np.asarray(X[0])
    logits = [x @ np.asarray(p["router"]["kernel"]) for p in (first, second)]
    wins = (logits[0].max(1) > logits[1].max(1))[:, None]
    assert 0 < wins.sum() < T
    assert_close(apply(both, 1), np.where(wins, definition(first, 1), definition(second, 1)), "float32")
    # A checkpoint with itself, with twice the experts a token, is itself; alone it is too.
    assert_close(apply(moe.aggregate_experts([first, first]), 4), definition(first, 2), "float32")
    jax.tree.map(np.testing.assert_array_equal, moe.aggregate_experts([first]), first)


def test_shared_experts_are_averaged():
    first, second = (params(i, shared_expand=1) for i in (1, 2))
    both = moe.aggregate_experts([first, second])["shared"]
    for name in ("in", "out"):
        mean = sum(np.asarray(each["shared"][name]["kernel"]) for each in (first, second)) / 2
        np.testing.assert_allclose(both[name]["kernel"], mean, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: moe.prune_experts(p, jnp.ones(4), 2), r"load: got \[4\]; expected \[5\]"),
        (lambda p: moe.prune_experts(p, jnp.ones(E), 6), "keep: got 6; expected 1 to 5"),
        (lambda p: moe.prune_experts({"out": p}, jnp.ones(E), 2), "params: got out; expected those of a MoE"),
        (
            lambda p: moe.prune_experts(p | {"router": {"k": X[0].T}}, jnp.ones(E), 2),
            r"\[\.\.\., E\]",
        ),
        (lambda p: moe.aggregate_experts([]), "checkpoints: got none"),
        (lambda p: moe.aggregate_experts([p, p | {"shared": p["experts"]}]), "checkpoints: 1 differs from 0"),
        (
            lambda p: moe.aggregate_experts([p | {"shared": {"kernel": jnp.ones(3, jnp.uint8)}}]),
            "shared: got uint8, of packed weights",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(params(1))
