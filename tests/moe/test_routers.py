"""Routers, choices and losses against loops in NumPy, their gradients, and what must hold for any of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import moe
from frugax.moe.selection import within_groups

T, E, K = 13, 6, 2
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((T, E)).astype(np.float32)
MASK = np.arange(T) < 10
KEY = jax.random.key(0)

# Name -> (function of logits and a mask, whether each token gets K experts)
ROUTERS = {
    "softmax_top_k": lambda x, mask=None: moe.softmax_top_k(x, K, mask=mask),
    "softmax_top_k, groups": lambda x, mask=None: moe.softmax_top_k(x, K, groups=3, top_groups=2, mask=mask),
    "sigmoid_top_k": lambda x, mask=None: moe.sigmoid_top_k(x, K, bias=jnp.arange(E) * 0.1, mask=mask),
    "noisy_top_k": lambda x, mask=None: moe.noisy_top_k(x, K, noise_logits=x * 0.5, key=KEY, mask=mask),
    "expert_choice": lambda x, mask=None: moe.expert_choice(x, capacity=1.5, mask=mask),
    "sinkhorn_top_k": lambda x, mask=None: moe.sinkhorn_top_k(x, K, mask=mask),
    "relu_route": lambda x, mask=None: moe.relu_route(x, mask=mask),
    "hash_route": lambda x, mask=None: moe.hash_route(jnp.arange(T), jnp.arange(T) % E, E, mask=mask),
}
every = pytest.mark.parametrize("name", ROUTERS)


def compiled(function, x, **how):
    """Return function(x, **how) by one program: without, each of its steps would be one."""
    return jax.jit(functools.partial(function, **how))(x)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def best(scores, k):
    return np.argsort(-scores, -1, kind="stable")[..., :k]


def dense(routing) -> np.ndarray:
    """Weights [T, E]."""
    out = np.zeros((T, E))
    for token, expert, weight in zip(*map(np.asarray, routing.assignments()), strict=True):
        out[token, expert] += weight
    return out


@every
def test_what_holds_for_every_router(name):
    """Statistics are those of the assignments; masked tokens are nowhere; tokens' order does not matter."""
    route = jax.jit(ROUTERS[name])
    routing = route(LOGITS, mask=MASK)
    weights = dense(routing)
    assert routing.indices.dtype == jnp.int32
    assert routing.weights.dtype == jnp.float32
    assert (weights[~MASK] == 0).all()
    count = (weights != 0).sum(0)
    np.testing.assert_allclose(routing.statistics.load, count / count.sum(), rtol=1e-6)
    load = count[count > 0] / count.sum()
    np.testing.assert_allclose(
        routing.statistics.entropy, -(load * np.log(load)).sum() / np.log(E), rtol=1e-5
    )
    unrouted = (weights[MASK] == 0).all(-1).mean()
    np.testing.assert_allclose(routing.statistics.unrouted, unrouted, atol=1e-6)
    # Masked tokens change nothing for the others.
    other = LOGITS.copy()
    other[~MASK] = 7 * RNG.standard_normal(other[~MASK].shape)
    if name not in ("noisy_top_k", "sinkhorn_top_k"):
        again = route(other, mask=MASK)
        np.testing.assert_allclose(dense(again), weights, rtol=1e-6)
        for loss, value in routing.losses.items():
            np.testing.assert_allclose(again.losses[loss], value, rtol=1e-5, err_msg=loss)
    if name not in ("noisy_top_k", "hash_route"):
        order = RNG.permutation(T)
        np.testing.assert_allclose(dense(route(LOGITS[order])), dense(route(LOGITS))[order], rtol=1e-4)


def test_softmax():
    p = softmax(LOGITS)
    chosen = best(p, K)
    routing = compiled(moe.softmax_top_k, LOGITS, k=K)
    np.testing.assert_array_equal(routing.indices, chosen)
    picked = np.take_along_axis(p, chosen, 1)
    np.testing.assert_allclose(routing.weights, picked / picked.sum(1, keepdims=True), rtol=1e-5)
    plain = compiled(moe.softmax_top_k, LOGITS, k=K, normalize=False, scale=2.5)
    np.testing.assert_allclose(plain.weights, 2.5 * picked, rtol=1e-5)
    share = np.array([(chosen == e).sum() / (T * K) for e in range(E)])
    np.testing.assert_allclose(routing.losses["load_balance"], E * (share * p.mean(0)).sum(), rtol=1e-5)
    z = np.log(np.exp(LOGITS).sum(1)) ** 2
    np.testing.assert_allclose(routing.losses["z"], z.mean(), rtol=1e-5)


def test_sigmoid_with_a_bias_and_groups():
    """The bias chooses and has no part in weights; a group is worth its two best."""
    bias = np.linspace(0.5, -0.5, E).astype(np.float32)
    s = sigmoid(LOGITS)
    how = {"groups": 2, "top_groups": 1, "scale": 2.0}
    routing = compiled(moe.sigmoid_top_k, LOGITS, k=K, bias=jnp.asarray(bias), **how)
    indices, weights = np.asarray(routing.indices), np.asarray(routing.weights)
    for t in range(T):
        by = s[t] + bias
        group = max((0, 1), key=lambda g: np.sort(by[3 * g : 3 * g + 3])[-2:].sum())
        chosen = 3 * group + best(by[3 * group : 3 * group + 3], K)
        np.testing.assert_array_equal(indices[t], chosen)
        np.testing.assert_allclose(weights[t], 2 * s[t, chosen] / s[t, chosen].sum(), rtol=1e-5)
    grad = compiled(jax.grad(lambda b: moe.sigmoid_top_k(jnp.asarray(LOGITS), K, bias=b).weights.sum()), bias)
    assert (np.asarray(grad) == 0).all()


def test_the_bias_evens_out_loads():
    """1,000 updates on tokens that all prefer one expert: loads end within a tenth of even."""
    logits = jnp.asarray(RNG.standard_normal((256, E)) + np.array([2, 0, 0, 0, 0, -1]), jnp.float32)

    def step(bias, _):
        load = moe.sigmoid_top_k(logits, K, bias=bias).statistics.load
        return moe.updated_bias(bias, load, 1e-2), load

    _, loads = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(E), None, length=300))()
    loads = np.asarray(loads)
    assert np.abs(loads[0] * E - 1).max() > 0.5
    assert np.abs(loads[-20:].mean(0) * E - 1).max() < 0.1
    assert moe.updated_bias(jnp.zeros(E, jnp.bfloat16), jnp.ones(E, jnp.float32)).dtype == jnp.bfloat16


def test_groups_of_softmax_keep_the_best_group():
    scores = softmax(LOGITS)
    kept = np.isfinite(jax.jit(within_groups, static_argnums=(1, 2, 3))(scores, 3, 1, 1))
    np.testing.assert_array_equal(
        np.argmax(kept.reshape(T, 3, 2).all(-1), -1), scores.reshape(T, 3, 2).max(-1).argmax(-1)
    )
    assert (kept.sum(1) == 2).all()


def test_noise():
    """Without a key no noise; with one, the load is the probability to be chosen again, by many draws."""
    quiet = compiled(moe.noisy_top_k, LOGITS, k=K)
    np.testing.assert_array_equal(quiet.indices, best(LOGITS, K))
    picked = np.take_along_axis(LOGITS, best(LOGITS, K), 1)
    np.testing.assert_allclose(quiet.weights, softmax(picked), rtol=1e-5)
    size = np.log1p(np.exp(0.5 * LOGITS)) + 1e-2
    noise = np.asarray(jax.random.normal(KEY, LOGITS.shape))
    noisy = LOGITS + size * noise
    routing = compiled(moe.noisy_top_k, LOGITS, k=K, noise_logits=jnp.asarray(0.5 * LOGITS), key=KEY)
    np.testing.assert_array_equal(routing.indices, best(noisy, K))
    given = {"noise_logits": jnp.asarray(0.5 * LOGITS), "noise": jnp.asarray(noise)}
    jax.tree.map(np.testing.assert_array_equal, compiled(moe.noisy_top_k, LOGITS, k=K, **given), routing)
    load = np.zeros(E)
    fresh = RNG.standard_normal((20000, E))
    for t, e in itertools.product(range(T), range(E)):
        kth = np.sort(np.delete(noisy[t], e))[-K]
        load[e] += (LOGITS[t, e] + size[t, e] * fresh[:, e] > kth).mean()
    np.testing.assert_allclose(routing.losses["load"], np.var(load) / np.mean(load) ** 2, rtol=0.05)


def test_expert_choice():
    scores = softmax(LOGITS)
    routing = compiled(moe.expert_choice, LOGITS, capacity=4)
    assert routing.by == "expert"
    np.testing.assert_array_equal(routing.indices, best(scores.T, 4))
    np.testing.assert_allclose(routing.weights, np.take_along_axis(scores.T, best(scores.T, 4), 1), rtol=1e-5)
    shapes = jax.eval_shape(functools.partial(moe.expert_choice, capacity=1.25), LOGITS)
    assert shapes.indices.shape == (E, int(np.ceil(1.25 * T / E)))


def test_sinkhorn_evens_out_rows_and_columns():
    plan = np.asarray(compiled(moe.sinkhorn, 3 * LOGITS, tolerance=1e-7, iterations=2000), np.float64)
    np.testing.assert_allclose(plan.sum(0), 1 / E, rtol=1e-3)
    np.testing.assert_allclose(plan.sum(1), 1 / T, rtol=1e-3)
    ratio = np.log(plan) - 3 * LOGITS  # a row's and a column's number, added
    left = ratio - ratio.mean(0) - ratio.mean(1, keepdims=True) + ratio.mean()
    assert np.abs(left).max() < 1e-4
    routing = compiled(moe.sinkhorn_top_k, LOGITS)
    np.testing.assert_allclose(
        np.asarray(routing.weights)[:, 0],
        np.take_along_axis(sigmoid(LOGITS), np.asarray(routing.indices), 1)[:, 0],
        rtol=1e-5,
    )


@jax.jit
def auctions(scores):
    """Experts by the auction itself, and by its router in training and after."""
    routings = (moe.base(scores, train=train).indices[:, 0] for train in (True, False))
    return moe.auction(scores), *routings


@pytest.mark.parametrize("seed", range(3))
def test_the_auction_is_the_best_even_assignment(seed):
    """Against SciPy's exact solution; every expert has the same number of tokens."""
    from scipy.optimize import linear_sum_assignment

    scores = np.random.default_rng(seed).standard_normal((24, 4)).astype(np.float32)
    scores[:, 0] += 2  # wanted by all
    experts, trained, tested = map(np.asarray, auctions(scores))
    assert (np.bincount(experts, minlength=4) == 6).all()
    wide = np.repeat(scores, 6, axis=1)
    exact = wide[linear_sum_assignment(wide, maximize=True)].sum()
    assert scores[np.arange(24), experts].sum() > exact - 24 * 1e-4 * np.ptp(scores) - 1e-4
    np.testing.assert_array_equal(trained, experts)
    np.testing.assert_array_equal(tested, scores.argmax(1))


@pytest.mark.nan
def test_the_auction_ends_where_all_are_alike_or_not_numbers():
    auction = jax.jit(moe.auction)
    for experts, value in ((4, 0), (4, np.nan), (4, -np.inf), (1, 0)):
        scores = np.full((8, experts), value, np.float32)
        counts = np.bincount(np.asarray(auction(scores)), minlength=experts)
        assert (counts == 8 // scores.shape[1]).all()


def test_relu():
    active = np.maximum(LOGITS, 0)
    gain = np.linspace(0.5, 2, E).astype(np.float32)
    routing = compiled(moe.relu_route, LOGITS, gain=jnp.asarray(gain))
    want = active / np.sqrt((active**2).mean(1, keepdims=True) + 1e-6) * gain
    np.testing.assert_allclose(routing.weights, want, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(routing.weights) != 0, LOGITS > 0)
    no_expert = compiled(moe.relu_route, -np.ones((2, 3), np.float32))
    assert np.isfinite(no_expert.weights).all()


def test_locality_and_chunks():
    """By hand, over documents and a ragged chunk."""
    follows = np.ones(T, bool)
    follows[[0, 5]] = False
    losses = []
    for t in range(1, T):
        if follows[t]:
            p, y = (
                sigmoid(5.0 * LOGITS[t - 1].astype(np.float64)),
                sigmoid(5.0 * LOGITS[t].astype(np.float64)),
            )
            losses.append(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())
    got = compiled(moe.activation_locality, LOGITS, follows=jnp.asarray(follows), steepness=5.0)
    np.testing.assert_allclose(got, np.mean(losses), rtol=1e-4)
    active = np.maximum(LOGITS, 0)
    p = active / (active.sum(1, keepdims=True) + 1e-5)
    union = [1 - np.prod(1 - p[i : i + 4], 0) for i in range(0, T, 4)]
    np.testing.assert_allclose(compiled(moe.chunk_sparsity, active, chunk=4), np.mean(union), atol=1e-4)
    far = np.full((3, 2), 1e4, np.float32)
    assert np.isfinite(compiled(moe.activation_locality, far, follows=jnp.ones(3, bool)))


@pytest.mark.parametrize(
    "name", ["softmax_top_k", "sigmoid_top_k", "noisy_top_k", "expert_choice", "relu_route"]
)
def test_gradients_of_weights_and_losses(name):
    """By finite differences in a direction that changes no choice."""
    direction = RNG.standard_normal(LOGITS.shape).astype(np.float32)

    def total(logits):
        routing = ROUTERS[name](logits)
        smooth = sum(routing.losses.values(), jnp.zeros(()))
        return (
            jnp.sum(
                routing.weights * jnp.cos(jnp.arange(routing.weights.size).reshape(routing.weights.shape))
            )
            + smooth
        )

    step = 2e-3
    total = jax.jit(jax.value_and_grad(total))
    above, below = (float(total(LOGITS + side * step * direction)[0]) for side in (1, -1))
    grad = np.asarray(total(LOGITS)[1])
    np.testing.assert_allclose(np.vdot(grad, direction), (above - below) / (2 * step), rtol=1e-2, atol=2e-3)
    assert np.abs(grad).max() > 1e-3


@pytest.mark.nan
@every
def test_a_token_that_is_not_a_number_is_seen(name):
    """Its weights are not numbers either: nothing is routed as if it were right."""
    if name == "hash_route":  # an id that the table has not, or an expert that there is not
        ids, table = jnp.array([0, 3, 1, -1, 4, 4]), jnp.array([2, E, 0, 1])
        mask = jnp.arange(6) < 5
        weights = compiled(moe.hash_route, ids, table=table, experts=E, mask=mask).weights
        np.testing.assert_array_equal(np.asarray(weights)[:, 0], [1, 1, *[np.nan] * 3, 0])
        letters, table = jnp.array([0, 97, 255], jnp.uint8), jnp.arange(256, dtype=jnp.uint8)
        routed = compiled(moe.hash_route, letters, table=table, experts=256)  # no byte counts to 256
        assert routed.indices[:, 0].tolist() == [0, 97, 255]
        assert routed.weights[:, 0].tolist() == [1, 1, 1]
        return
    for where in (3, (3, 1)):
        bad = LOGITS.copy()
        bad[where] = np.nan
        assert np.isnan(compiled(ROUTERS[name], bad).weights).any()


def test_by_name():
    routing = compiled(moe.route, LOGITS, router="softmax_top_k", k=3)
    np.testing.assert_array_equal(routing.indices, best(LOGITS, 3))
    mine = compiled(moe.route, LOGITS, router=lambda logits, k: moe.softmax_top_k(-logits, k), k=1)
    np.testing.assert_array_equal(np.asarray(mine.indices)[:, 0], LOGITS.argmin(1))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: moe.softmax_top_k(x, 7), "k: got 7; expected 1 to 6"),
        (lambda x: moe.softmax_top_k(x, 0), "k: got 0"),
        (lambda x: moe.softmax_top_k(x, 1, groups=4), "groups: got 4; expected a divisor of 6"),
        (lambda x: moe.softmax_top_k(x, 1, groups=3, top_groups=4), "top_groups: got 4"),
        (lambda x: moe.softmax_top_k(x[0], 1), "logits: got float32"),
        (lambda x: moe.softmax_top_k(x.astype(jnp.int32), 1), "logits: got int32"),
        (lambda x: moe.sigmoid_top_k(x, 1, bias=jnp.zeros(3)), r"bias: got \[3\]; expected \[6\]"),
        (lambda x: moe.noisy_top_k(x, 1, key=KEY), "noise_logits: got None"),
        (lambda x: moe.noisy_top_k(x, 1, noise_logits=x, noise=x, key=KEY), "noise: got .* and a key"),
        (lambda x: moe.expert_choice(x, capacity=0), "capacity: got 0"),
        (lambda x: moe.expert_choice(x, capacity=14), "capacity: got 14"),
        (lambda x: moe.expert_choice(x, capacity=float("nan")), "capacity: got nan; expected"),
        (lambda x: moe.expert_choice(x, capacity=float("inf")), "capacity: got inf; expected"),
        (lambda x: moe.expert_choice(x, capacity=True), "capacity: got True; expected"),
        (lambda x: moe.softmax_top_k(x, True), "k: got True; expected 1 to 6"),
        (lambda x: moe.softmax_top_k(x, 2.0), "k: got 2.0; expected 1 to 6"),
        (lambda x: moe.softmax_top_k(x, 1, groups=0), "groups: got 0; expected a divisor of 6"),
        (lambda x: moe.softmax_top_k(x, 3, groups=3), "k: got 3; expected 1 to 2, the experts of"),
        (lambda x: moe.softmax_top_k(x, 1, mask=jnp.ones(3, bool)), r"mask: got \[3\]; expected \[13\]"),
        (lambda x: moe.soft_route(x[..., None], mask=jnp.ones(3, bool)), r"mask: got \[3\]"),
        (lambda x: moe.noisy_top_k(x, 1, noise_logits=x[:, :1], key=KEY), r"noise_logits: got \[13, 1\]"),
        (lambda x: moe.relu_route(x, gain=jnp.ones(1)), r"gain: got \[1\]; expected a number or \[6\]"),
        (lambda x: moe.hash_route(x[:, 0], jnp.arange(6), 6), "tokens: got float32"),
        (lambda x: moe.base(x), "scores: got 13 tokens for 6 experts"),
        (lambda x: moe.route(x, "switch"), "router: got 'switch'; expected one of softmax_top_k"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(jnp.asarray(LOGITS))
