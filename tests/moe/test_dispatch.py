"""Dispatch and combine: every method is the loop over tokens and experts; drops are counted and unbiased."""

import functools

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
    "all to one": lambda x: moe.softmax_top_k(x + jnp.array([[0, 0, 99.0, 0, 0]], jnp.float32), 1),
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
    routed = jax.jit(ROUTINGS[routing])(LOGITS)
    want, load = loop(routed), np.asarray(routed.statistics.load)
    cotangent = jnp.asarray(RNG.standard_normal((T, D + 1)), jnp.float32)

    def run(logits, x, method):
        y, plan = layer(logits, x, routing, method=method)
        return jnp.sum(y * cotangent), (y, plan.dropped, plan.group_sizes)

    @jax.jit  # one program for all methods
    def runs(logits, x):
        methods = ("einsum", "gather", "sort")
        return {m: jax.value_and_grad(run, (0, 1), has_aux=True)(logits, x, m) for m in methods}

    results = jax.device_get(runs(LOGITS, X))
    for method, ((_, (y, dropped, sizes)), grads) in results.items():
        np.testing.assert_allclose(y, want, atol=1e-5)
        assert dropped == 0
        np.testing.assert_allclose(sizes / sizes.sum(), load, rtol=1e-6)
        for mine, theirs in zip(grads, results["einsum"][1], strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-5, err_msg=method)
    assert np.abs(results["einsum"][1][1]).max() > 0.1


@pytest.mark.parametrize("method", ["gather", "einsum"])
def test_capacity(method):
    """No expert has more rows; what is dropped is the last of the lower rank; drops are reported."""

    @jax.jit
    def run(logits):
        routing = moe.softmax_top_k(logits, 2)
        rows, plan = moe.dispatch(jnp.asarray(X), routing, method=method, capacity=4)
        return routing, rows, plan, moe.combine(experts(rows, plan), plan)

    routing, rows, plan, y = run(LOGITS)
    assert rows.shape == (E, 4, D)
    indices, weights = np.asarray(routing.indices), np.asarray(routing.weights)
    seen, want = np.zeros(E, int), np.zeros((T, E))
    for choice in range(2):
        for t in range(T):
            e = indices[t, choice]
            if seen[e] < 4:
                want[t, e] = weights[t, choice]
            seen[e] += 1
    np.testing.assert_array_equal(plan.group_sizes, np.minimum(seen, 4))
    np.testing.assert_allclose(plan.dropped, 1 - np.minimum(seen, 4).sum() / (2 * T), rtol=1e-6)
    np.testing.assert_allclose(y, np.einsum("te,td,edf->tf", want, X, W), atol=1e-5)
    by_factor = functools.partial(moe.dispatch, method=method, capacity=1.25)
    factor = jax.eval_shape(lambda routing: by_factor(jnp.asarray(X), routing)[0], routing)
    assert factor.shape[1] == int(np.ceil(1.25 * 2 * T / E))


def test_random_selection_drops_no_place_more_than_another():
    """All tokens want one expert: in order the last are dropped, at random each as often."""
    x, logits = np.ones((40, 1), np.float32), np.tile(np.float32([9, 0]), (40, 1))

    def kept(key, order=None):
        routing = moe.softmax_top_k(jnp.asarray(logits), 1)
        rows, plan = moe.dispatch(jnp.asarray(x), routing, method="gather", capacity=10, key=key, order=order)
        return moe.combine(rows, plan)[:, 0] > 0

    np.testing.assert_array_equal(jax.jit(kept)(None), np.arange(40) < 10)
    np.testing.assert_array_equal(jax.jit(kept)(None, -jnp.arange(40)), np.arange(40) >= 30)
    share = np.asarray(jax.jit(jax.vmap(kept))(jax.random.split(jax.random.key(0), 500))).mean(0)
    assert (np.abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 500)).all()


def test_drops_by_position_are_even_at_random_and_skewed_in_order():
    """Top 2 of uneven scores overflow some experts; where all have room, nothing is lost."""
    trials, n = 400, 24
    key_logits, key_drops = jax.random.split(jax.random.key(1))
    logits = jax.random.normal(key_logits, (trials, n, 4)) + jnp.array([[[2.0, 0.5, 0.0, -1.0]]])
    x = jnp.ones((n, 1))

    def lost(logits, key, capacity=1.0):
        routing = moe.softmax_top_k(logits, 2)
        rows, plan = moe.dispatch(x, routing, method="gather", capacity=capacity, key=key)
        return 1 - moe.combine(rows, plan)[:, 0], plan.dropped

    keys = jax.random.split(key_drops, trials)
    both = jax.jit(lambda: (jax.vmap(lambda s: lost(s, None))(logits), jax.vmap(lost)(logits, keys)))
    (in_order, dropped), (at_random, as_many) = jax.device_get(both())
    assert dropped.mean() > 0.1
    np.testing.assert_array_equal(dropped, as_many)
    error, even = at_random.std(0) / np.sqrt(trials), at_random.mean(0)
    assert (np.abs(even - even.mean()) < 5 * error).all()
    skewed = in_order.mean(0)
    assert skewed[-8:].mean() > 2 * skewed[:8].mean() > 0
    assert (np.abs(skewed - skewed.mean()) > 5 * error).mean() > 0.5
    roomy = jax.jit(lambda: [lost(logits[0], key, n)[0] for key in (None, keys[0])])
    assert max(np.abs(x).max() for x in jax.device_get(roomy())) < 1e-6


def test_soft_routing_is_its_definition():
    """And masked tokens are in no slot."""
    logits = RNG.standard_normal((T, E, 2)).astype(np.float32)

    @jax.jit
    def run(logits):
        rows, plan = moe.dispatch(jnp.asarray(X), moe.soft_route(logits, mask=jnp.asarray(MASK)))
        return rows, moe.combine(experts(rows, plan), plan), moe.soft_route(logits).into.sum(0)

    rows, y, sums = run(logits)
    e = np.exp(logits.astype(np.float64)) * MASK[:, None, None]
    into, out = e / e.sum(0), e / np.where(MASK, e.sum((1, 2)), 1)[:, None, None]
    np.testing.assert_allclose(rows, np.einsum("tes,td->esd", into, X), atol=1e-5)
    np.testing.assert_allclose(
        y, np.einsum("tes,esf->tf", out, np.einsum("tes,td,edf->esf", into, X, W)), atol=1e-5
    )
    np.testing.assert_allclose(sums, 1, rtol=1e-5)


def test_bfloat16_sums_in_float32():
    x = X.astype(jnp.bfloat16)

    @jax.jit
    def run(logits):
        routing = moe.softmax_top_k(logits, 4, normalize=False)
        rows, plan = moe.dispatch(jnp.asarray(x), routing)
        return routing.weights, rows, moe.combine(rows, plan)

    weights, rows, y = run(LOGITS)
    assert rows.dtype == y.dtype == jnp.bfloat16
    exact = x.astype(np.float64) * np.asarray(weights).sum(1, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8)


@pytest.mark.nan
def test_rows_past_the_groups_are_zero():
    """And what an expert makes of them, even if it is not a number, reaches no token."""

    @jax.jit
    def run(logits):
        rows, plan = moe.dispatch(jnp.asarray(X), ROUTINGS["masked"](logits))
        return rows, plan.group_sizes.sum(), moe.combine(rows.at[30:].set(jnp.nan), plan)

    rows, used, y = map(np.asarray, run(LOGITS))
    assert used == 30
    assert (rows[used:] == 0).all()
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(y[~MASK], 0)


def capped(routing, capacity, **how):
    return moe.dispatch(jnp.ones((T, 2)), routing, method="gather", capacity=capacity, **how)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: moe.dispatch(jnp.ones((3, 2)), r), r"x: got \[3, 2\]; expected the 17 tokens"),
        (lambda r: moe.dispatch(jnp.ones((T, 2), jnp.int32), r), "x: got int32"),
        (lambda r: moe.dispatch(jnp.ones((T, 2)), r, method="all"), "method: got 'all'"),
        (lambda r: moe.dispatch(jnp.ones((T, 2)), r, capacity=3), "capacity: got 3 with method='sort'"),
        (lambda r: capped(r, 0), "capacity: got 0, 0 tokens an expert; expected at least 1"),
        (lambda r: capped(r, -1.25), "capacity: got -1.25, -8 tokens an expert; expected at least 1"),
        (lambda r: capped(r, float("nan")), "capacity: got nan; expected a number of tokens"),
        (lambda r: capped(r, float("inf")), "capacity: got inf; expected a number of tokens"),
        (lambda r: capped(r, True), "capacity: got True; expected a number of tokens"),
        (lambda r: capped(r, "all"), "capacity: got 'all'; expected a number of tokens"),
        (lambda r: capped(r, 1, order=jnp.arange(3)), r"order: got \[3\]; expected \[34\]"),
        (lambda r: moe.combine(jnp.ones((3, 2)), moe.dispatch(jnp.ones((T, 2)), r)[1]), r"y: got \[3, 2\]"),
        (lambda r: moe.soft_route(jnp.ones((3, 2), jnp.float32)), r"logits: got float32\[3, 2\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(jax.jit(ROUTINGS["top 2"])(LOGITS))
