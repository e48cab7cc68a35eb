"""Dispatch and combine: every method is the loop over tokens and experts; drops are counted and unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import moe

T, E, D = 17, 5, 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((T, D)).astype(np.float32)
W = RNG.standard_normal((E, D, D + 1)).astype(np.float32)
LOGITS = RNG.standard_normal((T, E)).astype(np.float32)
MASK = np.arange(T) < 15
ROUTINGS = {
    "top 2": lambda x: moe.softmax_top_k(x, 2),
    "masked": lambda x: moe.softmax_top_k(x, 2, mask=jnp.asarray(MASK)),
    "all to one": lambda x: moe.softmax_top_k(x + jnp.array([0, 0, 99.0, 0, 0]), 1),
    "relu": lambda x: moe.relu_route(x),
    "expert choice": lambda x: moe.expert_choice(x, capacity=4),
}


def experts(rows, plan):
    """Experts that multiply by matrices of their own."""
    if plan.method == "sort":
        return jax.lax.ragged_dot(rows, jnp.asarray(W), plan.group_sizes)
    return jnp.einsum("ecd,edf->ecf", rows, W)


def layer(logits, x, routing, **options):
    rows, plan = moe.dispatch(x, ROUTINGS[routing](logits), **options)
    return moe.combine(experts(rows, plan), plan), plan


def loop(routing) -> np.ndarray:
    out = np.zeros((T, D + 1))
    for token, expert, weight in zip(*map(np.asarray, routing.assignments()), strict=True):
        out[token] += weight * (X[token].astype(np.float64) @ W[expert])
    return out


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_method_is_the_loop(routing):
    """Values, and gradients of tokens and logits against the one-hot definition."""
    want = loop(ROUTINGS[routing](jnp.asarray(LOGITS)))
    cotangent = jnp.asarray(RNG.standard_normal((T, D + 1)), jnp.float32)
    grads = {}
    for method in ("einsum", "gather", "sort"):

        def run(logits, x, method=method):
            y, plan = layer(logits, x, routing, method=method)
            return jnp.sum(y * cotangent), (y, plan)

        (_, (y, plan)), grads[method] = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(LOGITS, X)
        np.testing.assert_allclose(y, want, atol=1e-5)
        assert float(plan.dropped) == 0
        load = np.asarray(ROUTINGS[routing](jnp.asarray(LOGITS)).statistics.load)
        np.testing.assert_allclose(plan.group_sizes / plan.group_sizes.sum(), load, rtol=1e-6)
    for method in ("gather", "sort"):
        for mine, theirs in zip(grads[method], grads["einsum"], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=method)
    assert float(jnp.abs(grads["einsum"][1]).max()) > 0.1


@pytest.mark.parametrize("method", ["gather", "einsum"])
def test_capacity(method):
    """No expert has more rows; what is dropped is the last of the lower rank; drops are reported."""
    routing = moe.softmax_top_k(jnp.asarray(LOGITS), 2)
    rows, plan = jax.jit(lambda r: moe.dispatch(jnp.asarray(X), r, method=method, capacity=4))(routing)
    assert rows.shape == (E, 4, D)
    seen, want = np.zeros(E, int), np.zeros((T, E))
    for choice in range(2):
        for t in range(T):
            e = int(routing.indices[t, choice])
            if seen[e] < 4:
                want[t, e] = routing.weights[t, choice]
            seen[e] += 1
    np.testing.assert_array_equal(plan.group_sizes, np.minimum(seen, 4))
    np.testing.assert_allclose(plan.dropped, 1 - np.minimum(seen, 4).sum() / (2 * T), rtol=1e-6)
    y = moe.combine(experts(rows, plan), plan)
    np.testing.assert_allclose(y, np.einsum("te,td,edf->tf", want, X, W), atol=1e-5)
    factor = moe.dispatch(jnp.asarray(X), routing, method=method, capacity=1.25)[0]
    assert factor.shape[1] == int(np.ceil(1.25 * 2 * T / E))


def test_random_selection_drops_no_place_more_than_another():
    """All tokens want one expert: in order the last are dropped, at random each as often."""
    x, routing = jnp.ones((40, 1)), moe.softmax_top_k(jnp.zeros((40, 2)).at[:, 0].set(9.0), 1)

    def kept(key):
        rows, plan = moe.dispatch(x, routing, method="gather", capacity=10, key=key)
        return moe.combine(rows, plan)[:, 0] > 0

    np.testing.assert_array_equal(jax.jit(kept)(None), np.arange(40) < 10)
    share = jax.jit(jax.vmap(kept))(jax.random.split(jax.random.key(0), 500)).mean(0)
    assert (np.abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 500)).all()


def test_drops_by_position_are_even_at_random_and_skewed_in_order():
    """Top 2 of uneven scores overflow some experts; where all have room, nothing is lost."""
    trials, n = 400, 24
    key_logits, key_drops = jax.random.split(jax.random.key(1))
    logits = jax.random.normal(key_logits, (trials, n, 4)) + jnp.array([2.0, 0.5, 0.0, -1.0])
    x = jnp.ones((n, 1))

    def lost(logits, key, capacity=1.0):
        routing = moe.softmax_top_k(logits, 2)
        rows, plan = moe.dispatch(x, routing, method="gather", capacity=capacity, key=key)
        return 1 - moe.combine(rows, plan)[:, 0], plan.dropped

    keys = jax.random.split(key_drops, trials)
    (in_order, dropped), (at_random, as_many) = jax.jit(
        lambda: (jax.vmap(lambda s: lost(s, None))(logits), jax.vmap(lost)(logits, keys))
    )()
    assert float(dropped.mean()) > 0.1
    np.testing.assert_array_equal(dropped, as_many)
    error = np.asarray(at_random.std(0)) / np.sqrt(trials)
    even = np.asarray(at_random.mean(0))
    assert (np.abs(even - even.mean()) < 5 * error).all()
    skewed = np.asarray(in_order.mean(0))
    assert skewed[-8:].mean() > 2 * skewed[:8].mean() > 0
    assert (np.abs(skewed - skewed.mean()) > 5 * error).mean() > 0.5
    roomy = jax.jit(lambda key: lost(logits[0], key, n)[0])
    assert max(float(jnp.abs(roomy(key)).max()) for key in (None, keys[0])) < 1e-6


def test_soft_routing_is_its_definition():
    """And masked tokens are in no slot."""
    logits = RNG.standard_normal((T, E, 2)).astype(np.float32)
    rows, plan = moe.dispatch(jnp.asarray(X), moe.soft_route(jnp.asarray(logits), mask=jnp.asarray(MASK)))
    e = np.exp(logits.astype(np.float64)) * MASK[:, None, None]
    into, out = e / e.sum(0), e / np.where(MASK, e.sum((1, 2)), 1)[:, None, None]
    np.testing.assert_allclose(rows, np.einsum("tes,td->esd", into, X), atol=1e-5)
    y = moe.combine(experts(rows, plan), plan)
    np.testing.assert_allclose(
        y, np.einsum("tes,esf->tf", out, np.einsum("tes,td,edf->esf", into, X, W)), atol=1e-5
    )
    np.testing.assert_allclose(moe.soft_route(jnp.asarray(logits)).into.sum(0), 1, rtol=1e-5)


def test_bfloat16_sums_in_float32():
    routing = moe.softmax_top_k(jnp.asarray(LOGITS), 4, normalize=False)
    rows, plan = moe.dispatch(jnp.asarray(X, jnp.bfloat16), routing)
    assert rows.dtype == jnp.bfloat16
    y = moe.combine(rows, plan)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(jnp.asarray(X, jnp.bfloat16), np.float64) * np.asarray(routing.weights).sum(
        1, keepdims=True
    )
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8)


def test_rows_past_the_groups_are_zero():
    """And what an expert makes of them, even if it is not a number, reaches no token."""
    rows, plan = moe.dispatch(jnp.asarray(X), ROUTINGS["masked"](jnp.asarray(LOGITS)))
    used = int(plan.group_sizes.sum())
    assert used == 30
    assert (rows[used:] == 0).all()
    y = moe.combine(rows.at[used:].set(jnp.nan), plan)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[~MASK], 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: moe.dispatch(jnp.ones((3, 2)), r), r"x: got \[3, 2\]; expected the 17 tokens"),
        (lambda r: moe.dispatch(jnp.ones((T, 2), int), r), "x: got int32"),
        (lambda r: moe.dispatch(jnp.ones((T, 2)), r, method="all"), "method: got 'all'"),
        (lambda r: moe.dispatch(jnp.ones((T, 2)), r, capacity=3), "capacity: got 3 with method='sort'"),
        (lambda r: moe.dispatch(jnp.ones((T, 2)), r, method="gather", capacity=0), "capacity: got 0"),
        (lambda r: moe.combine(jnp.ones((3, 2)), moe.dispatch(jnp.ones((T, 2)), r)[1]), r"y: got \[3, 2\]"),
        (lambda r: moe.soft_route(jnp.ones((3, 2))), r"logits: got float32\[3, 2\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(moe.softmax_top_k(jnp.asarray(LOGITS), 2))
