"""Sparse MeZO, QZO, conservative steps, ZOODiP's subspace: what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from frugax.optim import zeroth_order as zo
from frugax.optim.zeroth_order.directions import loss_along
from tests.errors import assert_close
from tests.optim.zeroth_order.models import network


def problem(d=64):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((d, 8)), jnp.float32)
    goal = jnp.asarray(rng.standard_normal((d, 8)), jnp.float32)
    return w, lambda w: jnp.mean((w - goal) ** 2)


def run(step, params, steps, seed=0):
    """The parameters after `steps` of step(params, key), and every StepInfo."""
    return jax.jit(lambda p: jax.lax.scan(step, p, jax.random.split(jax.random.key(seed), steps)))(params)


def test_sparse_mezo_leaves_large_weights_alone():
    w, loss = problem()
    thresholds = zo.magnitude_thresholds(w, 0.75)
    large = np.asarray(jnp.abs(w) > thresholds)
    assert abs(large.mean() - 0.25) < 0.01

    def step(w, key):
        return zo.sparse_mezo_step(loss, w, key, learning_rate=0.1, epsilon=1e-3, thresholds=thresholds)

    after, info = jax.device_get(run(step, w, 50))
    w = np.asarray(w)
    np.testing.assert_array_equal(after[large], w[large])
    assert (after[~large] != w[~large]).mean() > 0.9
    assert info.loss[-1] < info.loss[0]


@pytest.mark.full
def test_sparse_mezo_with_every_weight_is_mezo():
    w, loss = problem()
    thresholds = jnp.float32(jnp.inf)
    sparse = run(
        lambda w, k: zo.sparse_mezo_step(loss, w, k, learning_rate=0.1, epsilon=1e-3, thresholds=thresholds),
        w,
        20,
    )
    plain = run(
        lambda w, k: zo.zo_step(
            loss, w, k, learning_rate=0.1, estimator=zo.two_point(1e-3, in_place=False)
        ), w, 20,
    )  # fmt: skip
    assert_close(sparse[0], plain[0], "float32")


def test_sparse_mezo_has_a_threshold_for_each_leaf():
    """A leaf of weights a hundred times smaller moves no more of them than the others do."""
    w, _ = problem()
    params = {"large": 100 * w, "small": w}
    thresholds = zo.magnitude_thresholds(params, 0.25)
    after, _ = jax.jit(
        lambda p: zo.sparse_mezo_step(
            lambda p: jnp.sum(p["large"] + p["small"]), p, jax.random.key(0), learning_rate=1.0,
            epsilon=1e-3, thresholds=thresholds,
        )
    )(params)  # fmt: skip
    for name, x in params.items():
        moves = np.abs(x) <= np.quantile(np.abs(x), 0.25)
        np.testing.assert_array_equal(after[name] != x, moves, err_msg=name)


def test_sparse_mezo_takes_its_mask_from_weights_that_did_not_move():
    """Far to either side is over thresholds: the slope is that of the first mask, and no bit drifts."""
    w, loss = problem()
    threshold, key = zo.magnitude_thresholds(w, 0.5), jax.random.key(0)
    after, info = jax.jit(
        lambda w: zo.sparse_mezo_step(loss, w, key, learning_rate=0.0, epsilon=0.5, thresholds=threshold)
    )(w)
    np.testing.assert_array_equal(after, w)
    z = jax.random.normal(jax.random.fold_in(key, 0), w.shape, jnp.float32)
    z = np.where(np.abs(w) <= threshold, z, 0)
    above, below = (float(loss(w + side * 0.5 * z)) for side in (1, -1))
    assert_close(info.slope, above - below, "float32", times=10)  # a difference of losses over 1


def test_sparse_mezo_masks_inside_the_forward_pass():
    """Beyond a forward pass of four scanned layers: one layer of weights, no copy of all and no mask."""
    params, loss = network(layers=4, width=256)
    layer = params["w"][0].nbytes
    thresholds = zo.magnitude_thresholds(params, 0.5)

    def step(w, key):
        return zo.sparse_mezo_step(loss, w, key, learning_rate=0.1, epsilon=1e-3, thresholds=thresholds)

    def temporaries(f, **donate):
        compiled = jax.jit(f, **donate).lower(params, jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(step, donate_argnums=0) < temporaries(lambda p, key: loss(p)) + 1.1 * layer


WAYS = ["sparse", *(pytest.param(name, marks=pytest.mark.full) for name in ("gaussian", "random"))]


@pytest.mark.parametrize("way", WAYS)
def test_weights_moved_where_they_are_read_are_the_moved_weights(way):
    """Scans (forwards, backwards, nested, with remat), calls, leaves read twice or whole: the same loss."""
    params = {
        "deep": jax.random.normal(jax.random.key(1), (3, 2, 4, 4)) / 2,
        "tied": jax.random.normal(jax.random.key(2), (6, 4)),
        "scale": jnp.ones((3, 4)),
    }
    thresholds = zo.magnitude_thresholds(params, 0.5)

    def loss(p):
        @jax.checkpoint
        def inner(h, w):
            return jax.jit(jnp.tanh)(h @ w), jnp.sum(w)

        def outer(h, layer):
            return jax.lax.scan(inner, h * layer[1][None], layer[0])

        h, sums = jax.lax.scan(outer, p["tied"], (p["deep"], p["scale"]), reverse=True)
        return jnp.mean((h @ p["tied"].T) ** 2) + jnp.mean(sums), {"untouched": p["scale"]}

    ways = {"gaussian": zo.gaussian, "sparse": zo.sparse(thresholds), "random": zo.random_subset(0.5)}
    key, amount, direction = jax.random.key(4), jnp.float32(0.3), ways[way]

    @jax.jit
    def both(p):
        there = zo.displace(p, key, amount, direction)
        return loss_along(loss, p, key, amount, direction), loss(there), loss(p)

    got, want, before = both(params)
    assert_close(got, want, "float32")
    assert abs(want[0] - before[0]) > 1e-3


def test_a_random_subset_moves_its_share():
    """Each leaf's own share; a fresh mask with each step, or one for as long as its key is held."""
    params = {"a": jnp.zeros(4000), "b": jnp.zeros(4000)}
    share = {"a": 0.1, "b": 0.6}

    @jax.jit
    def displaced(key, held=None):
        return zo.displace(params, jax.random.key(key), 1.0, zo.random_subset(share, mask_key=held))

    def moved(key, held=None):
        return {k: np.asarray(x) != 0 for k, x in displaced(key, held).items()}

    first, second = moved(0), moved(1)
    for name, density in share.items():
        assert abs(first[name].mean() - density) < 0.03
        assert (first[name] != second[name]).mean() > density / 2
    held = jax.random.key(7)
    np.testing.assert_array_equal(moved(0, held)["b"], moved(1, held)["b"])
    # The direction is that of `gaussian`, where it moves.
    after = np.asarray(displaced(0)["b"])
    plain = np.asarray(jax.jit(lambda key: zo.displace(params, key, 1.0))(jax.random.key(0))["b"])
    np.testing.assert_array_equal(after[first["b"]], plain[first["b"]])
    assert abs(np.corrcoef(first["b"], plain)[0, 1]) < 0.06


def test_global_sparsity_gives_small_leaves_more():
    params = {"large": 11 + jnp.arange(30.0), "small": jnp.arange(1.0, 11.0)}
    assert zo.magnitude_densities(params, 0.25) == {"large": 0.0, "small": 1.0}
    found = zo.magnitude_densities(params, 0.5)
    assert found["small"] == 1.0
    assert abs(found["large"] - 1 / 3) < 1e-6


def quantized_model():
    rng = np.random.default_rng(0)
    q = frugax.formats.quantize(jnp.asarray(rng.standard_normal((32, 16)), jnp.float32), "int4", group_size=8)
    x = jnp.asarray(rng.standard_normal((128, 32)), jnp.float32)
    y = x @ (1.5 * q.dequantize())
    params = {"q": q, "bias": jnp.zeros(16)}
    return params, lambda p: jnp.mean((x @ p["q"].dequantize() + p["bias"] - y) ** 2)


@pytest.mark.full
def test_qzo_estimates_the_gradient_of_the_scales():
    params, loss = quantized_model()
    n = 1000
    slopes = jax.jit(
        lambda keys: jax.lax.map(
            lambda k: zo.qzo_step(loss, params, k, learning_rate=-1e-3, epsilon=1e-3, clip=None), keys
        )
    )(jax.random.split(jax.random.key(0), n))[0]
    estimate = np.asarray(slopes["q"].scales - params["q"].scales, np.float64).mean(0)
    exact = np.asarray(jax.grad(loss, allow_int=True)(params)["q"].scales, np.float64)
    cosine = np.sum(estimate * exact) / np.linalg.norm(estimate) / np.linalg.norm(exact)
    # The mean of n draws has an error of |g| sqrt((d + 1) / n) for d = 64 scales: a quarter of |g|.
    assert cosine > 0.93


@pytest.mark.full
def test_qzo_tunes_scales_and_nothing_else():
    params, loss = quantized_model()
    after, info = run(
        lambda p, k: zo.qzo_step(loss, p, k, learning_rate=1e-3, epsilon=1e-4, clip=100.0), params, 500
    )
    np.testing.assert_array_equal(after["q"].codes, params["q"].codes)
    np.testing.assert_array_equal(after["bias"], params["bias"])
    assert info.loss[-20:].mean() < 0.2 * info.loss[:20].mean()


@pytest.mark.full
def test_qzo_clipping_prevents_a_divergence():
    params, loss = quantized_model()

    def train(clip):
        def step(p, key):
            return zo.qzo_step(loss, p, key, learning_rate=3.6e-3, epsilon=1e-4, clip=clip)

        return run(step, params, 200)[1]

    free, clipped = train(None), train(2.0)
    assert not free.loss[-1] < 1e3 * free.loss[0]
    assert clipped.loss[-1] < 0.5 * clipped.loss[0]
    assert (jnp.abs(clipped.slope) <= 2.0).all()


def test_a_conservative_step_never_raises_the_loss():
    """At a rate where plain steps diverge; and its log replays, since the choice is in the scalar."""
    w, loss = problem(1)

    def step(w, key):
        return zo.conservative_step(loss, w, key, learning_rate=1.5, estimator=zo.forward_gradient())

    after, info = run(step, w, 100)
    losses = np.append(info.loss, jax.jit(loss)(after))
    assert (np.diff(losses) <= 0).all()
    assert losses[-1] < losses[0]
    plain = run(
        lambda w, k: zo.zo_step(loss, w, k, learning_rate=1.5, estimator=zo.forward_gradient()), w, 100
    )
    assert not plain[1].loss[-1] < losses[0]
    keys = jax.random.split(jax.random.key(0), 100)
    assert_close(jax.jit(zo.replay)(w, keys, info.scalar), after, "float32")


def test_a_conservative_step_takes_the_way_back_where_that_is_lower():
    """A slope that points uphill: of stay, there and back, back has the least loss."""
    wrong = lambda loss_fn, p, key, direction: zo.Estimate(  # noqa: E731
        p, 0.0, loss_fn(p), -zo.forward_gradient()(loss_fn, p, key, direction).slope
    )
    w, loss = problem(3)

    def step(estimator, w):
        after, info = zo.conservative_step(
            loss, w, jax.random.key(0), learning_rate=0.01, estimator=estimator
        )
        return after, info.scalar, loss(after), loss(w)

    both = jax.jit(lambda w: (step(wrong, w), step(zo.forward_gradient(), w)))
    (back, scalar, *_), (there, right, lower, higher) = jax.device_get(both(w))
    assert lower < higher
    assert_close(back, there, "float32")
    assert_close(scalar, right, "float32")


def test_the_history_subspace_is_pca():
    """Against numpy: of the last window's components, those past the share that is trusted are removed."""
    window, d = 6, 10
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((3 * window, 3)) * [5, 1, 0.5]) @ np.linalg.qr(rng.standard_normal((d, 3)))[
        0
    ].T
    values = np.float32(values + rng.standard_normal(d))
    tx = zo.history_subspace(window, 0.9)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(d))
    for t, value in enumerate(values):
        g = np.float32(rng.standard_normal(d))
        got, state = update(jnp.asarray(g), state, jnp.asarray(value))
        if t < window:
            assert_close(got, g, "float32")
            continue
        last = values[t // window * window - window : t // window * window]
        _, sizes, directions = np.linalg.svd(last - last.mean(0))
        share = np.cumsum(sizes**2) / np.sum(sizes**2)
        noise = directions[np.searchsorted(share, 0.9) + 1 : 3]  # of three directions that it moved along
        assert len(noise) > 0
        # Directions are as exact as values over the gap between their sizes, here about a fifth of them.
        assert_close(got, g - noise.T @ (noise @ g), "float32", times=10)


@pytest.mark.full
def test_the_history_subspace_denoises():
    """In a valley of 2 dimensions of 20, at equal passes and lengths of steps, it points and gets closer."""
    d = 20
    goal = jnp.zeros(d).at[:2].set(6.0)
    curvature = jnp.full(d, 1e-3).at[:2].set(1.0)
    loss = lambda w: 0.5 * jnp.sum(curvature * (w - goal) ** 2)  # noqa: E731

    def descend(tx):
        def step(carry, key):
            w, state = carry
            g, _ = zo.zo_gradient(loss, w, key, estimator=zo.forward_gradient(), samples=2)
            exact = jax.grad(loss)(w)
            g, state = tx.update(g, state, w)
            g = g / jnp.linalg.norm(g)
            return (w - 0.1 * g, state), g @ exact / jnp.linalg.norm(exact)

        start = (jnp.zeros(d), tx.init(jnp.zeros(d)))
        (w, _), cosines = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 100))
        return loss(w), cosines[30:].mean()

    plain, noisy = jax.jit(lambda: descend(optax.identity()))()
    projected, clean = jax.jit(lambda: descend(zo.history_subspace(30, 0.5)))()
    assert clean > 1.5 * noisy
    assert projected < 0.5 * plain


def test_the_history_subspace_lets_parameters_go_where_they_have_not_been():
    """The gradient turns to an axis along which the whole history stood still."""
    tx = zo.history_subspace(4, 0.9)
    step, w, state = jax.jit(tx.update), jnp.zeros(3), tx.init(jnp.zeros(3))
    axes = np.eye(3, dtype=np.float32)
    for t in range(12):
        g, state = step(jnp.asarray(axes[int(t >= 8)]), state, w)
        w = jnp.asarray(w - np.float32(0.1) * np.asarray(g))
    assert_close(w, -0.1 * jnp.array([8.0, 4.0, 0.0]), "float32")
