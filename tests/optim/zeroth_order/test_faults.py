"""Complex leaves, losses that are not finite, weight decay, schedules, and directions that move nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from frugax.optim import mezo_step
from frugax.optim import zeroth_order as zo
from tests.errors import assert_close

AWAY = zo.two_point(1e-3, in_place=False)
W = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)


def test_complex_leaves_descend_along_independent_parts():
    """The step is -rate * slope * z with z of N(0, 1) in both parts; the mean is the gradient's conjugate."""
    w = jnp.asarray(np.asarray(W) + np.complex64(1j) * np.asarray(W)[::-1])
    goal = np.complex64(0.3 - 0.2j)

    def loss(w):
        return jnp.sum(jnp.abs(w - goal) ** 2)

    new, info = jax.jit(lambda key: mezo_step(loss, w, key, learning_rate=0.01, epsilon=1e-2))(
        jax.random.key(1)
    )
    assert new.dtype == w.dtype
    moved, info, at = np.asarray(new), jax.device_get(info), np.asarray(w)
    z = np.complex128(moved - at) / float(info.scalar)
    assert 0.4 < z.real.std() < 1.6
    assert 0.4 < z.imag.std() < 1.6
    assert abs(np.corrcoef(z.real.ravel(), z.imag.ravel())[0, 1]) < 0.6
    assert abs(info.slope - 2 * np.sum(((at - goal).conj() * z).real)) < 0.02 * abs(info.slope)
    gradient, _ = jax.jit(
        lambda key: zo.zo_gradient(loss, w, key, estimator=zo.forward_gradient(), samples=2000)
    )(jax.random.key(0))
    exact = np.asarray(jax.jit(jax.grad(loss))(w))
    gradient = np.asarray(gradient)
    spread = np.sqrt((np.sum(np.abs(exact) ** 2) + np.abs(exact) ** 2) / 2000)  # of either part
    assert (np.abs(gradient - exact) < 7 * spread).all()
    assert error_of_conjugate(gradient, exact) > 1


def error_of_conjugate(got, exact):
    return np.linalg.norm(np.conj(got) - exact) / np.linalg.norm(exact)


STEPS = {
    "mezo": lambda loss, w, key: mezo_step(loss, w, key, learning_rate=0.1, epsilon=1e-3, weight_decay=0.5),
    "clipped": lambda loss, w, key: zo.zo_step(loss, w, key, learning_rate=0.1, estimator=AWAY, clip=1.0),
    "conservative": lambda loss, w, key: zo.conservative_step(
        loss, w, key, learning_rate=0.01, estimator=AWAY
    ),
}


@pytest.mark.nan
@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_loss_that_is_not_finite_moves_nothing(name):
    """NaN on both sides, or infinite on one: params stay, the record says so, and the next step is taken."""

    def step(w, bad):
        return STEPS[name](
            lambda w: jnp.sum(w**2) + jnp.where(jnp.isnan(bad) | (w[0, 0] > W[0, 0]), bad, 0), w, KEY
        )

    step = jax.jit(step)
    for bad in (jnp.nan, jnp.inf):
        after, info = step(W, bad)
        if name == "mezo":  # moved there and back: to rounding
            assert np.abs(after - W).max() <= 3 * np.finfo(np.float32).eps * np.abs(W).max()
        else:
            np.testing.assert_array_equal(after, W)
        assert info.skipped
        assert not np.isfinite(info.loss) or name == "conservative"
        assert info.scalar == 0
        assert info.decay == 0
    after, info = step(W, 0.0)
    assert not info.skipped
    assert (after != W).any()


KEY = jax.random.key(3)


@pytest.mark.nan
def test_conservative_does_not_fall_for_a_nan_on_one_side():
    """The losses of the moved weights alone are NaN: staying is the best that there is."""
    loss = lambda w: jnp.where(jnp.all(w == W), jnp.sum(W**2), jnp.nan)  # noqa: E731
    exact = lambda loss_fn, p, key, direction: zo.Estimate(p, 0.0, loss_fn(p), jnp.float32(1.0))  # noqa: E731
    after, info = jax.jit(lambda w: zo.conservative_step(loss, w, KEY, learning_rate=0.1, estimator=exact))(W)
    np.testing.assert_array_equal(after, W)
    assert info.scalar == 0


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.full)])
def test_weight_decay_and_schedule_are_those_of_adamw(in_place):
    """Against the definition in float64; what does not move, or is left out, does not decay."""
    params = {"bias": W[0], "frozen": W, "w": W}
    schedule, steps, rates = optax.linear_schedule(0.02, 0.005, 6), 6, []
    keys = jax.random.split(jax.random.key(0), steps)
    estimator = zo.two_point(1e-3, in_place=in_place)
    options = dict(direction=zo.only(lambda path: path != "frozen"), decays=lambda path: path != "bias")

    def loss(p):
        return sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(p))

    @jax.jit
    def run(params):
        def step(p, turn):
            key, count = turn
            return zo.zo_step(loss, p, key, learning_rate=schedule, count=count, estimator=estimator,
                              weight_decay=0.5, **options)  # fmt: skip

        return jax.lax.scan(step, params, (keys, jnp.arange(steps)))

    after, info = run(params)
    want = {k: np.asarray(x, np.float64) for k, x in params.items()}
    for t, key in enumerate(keys):
        rate = 0.02 - 0.015 * t / 6
        rates.append(rate)
        for i, name in enumerate(("bias", "frozen", "w")):
            if name != "frozen":
                z = jax.random.normal(jax.random.fold_in(key, i), want[name].shape, jnp.float32)
                z = np.asarray(z, np.float64)
                kept = 1 - rate * 0.5 if name == "w" else 1.0
                want[name] = kept * want[name] - rate * float(info.slope[t]) * z
    np.testing.assert_array_equal(after["frozen"], params["frozen"])
    np.testing.assert_allclose(info.decay, np.array(rates) * 0.5, rtol=1e-5)
    assert_close(after, want, "float32")
    again = jax.jit(
        lambda p: zo.replay(
            p, keys, info.scalar, decay=info.decay, epsilon=1e-3 if in_place else None, **options
        )
    )(params)
    assert_close(again, after, "float32")


def test_sparse_weights_do_not_decay():
    thresholds = zo.magnitude_thresholds(W, 0.5)
    how = dict(learning_rate=0.1, epsilon=1e-3, thresholds=thresholds, weight_decay=0.5)
    step = jax.jit(lambda w: zo.sparse_mezo_step(lambda w: jnp.sum(w**2), w, KEY, **how)[0])
    after, before = np.asarray(step(W)), np.asarray(W)
    large = np.abs(before) > np.asarray(thresholds)
    np.testing.assert_array_equal(after[large], before[large])
    assert (after[~large] != before[~large]).all()


@pytest.mark.usefixtures("unchecked_types")
def test_what_would_do_nothing_is_an_error():
    step = dict(learning_rate=0.1, epsilon=1e-3)
    with pytest.raises(ValueError, match="of which the direction moves none"):
        mezo_step(lambda p: 0.0, {"codes": jnp.arange(3)}, KEY, **step)
    with pytest.raises(ValueError, match=r"got leaves w \(float32\)"):
        mezo_step(lambda p: 0.0, {"w": W}, KEY, direction=zo.only(lambda path: "lora" in path), **step)
    with pytest.raises(ValueError, match="count: got None"):
        mezo_step(lambda p: 0.0, W, KEY, learning_rate=optax.constant_schedule(0.1), epsilon=1e-3)
    with pytest.raises(ValueError, match="no scales"):
        zo.qzo_step(lambda p: 0.0, W, KEY, **step)


def test_qzo_keeps_scales_positive():
    """Faults' own case: 60 steps at 0.05 with clip 5 drove an int4 tensor's scales to -0.6."""
    wide = np.abs(np.tile(np.asarray(W), (2, 3)))[:8, :8]
    q = jax.jit(lambda w: frugax.formats.quantize(w, "int4"))(wide)
    loss = lambda q: jnp.sum((q.dequantize() + 3) ** 2)  # noqa: E731

    def step(q, key):
        return zo.qzo_step(loss, q, key, learning_rate=0.05, epsilon=1e-3, clip=5.0)

    keys = jax.random.split(jax.random.key(0), 60)
    after, info = jax.jit(lambda q: jax.lax.scan(step, q, keys))(q)
    free = jax.jit(lambda q: zo.replay(q, keys, info.scalar))({"scales": q.scales})  # without the projection
    assert (np.asarray(after.scales) > 0).all()
    assert np.abs(info.slope).max() == 5
    assert (np.asarray(free["scales"]) < 0).any()
    direction = zo.only(lambda path: path.endswith("scales"))
    how = dict(epsilon=1e-3, direction=direction, project=zo.positive_scales)
    again = jax.jit(lambda q: zo.replay(q, keys, info.scalar, **how))(q)
    assert_close(again.scales, after.scales, "float32")
    np.testing.assert_array_equal(after.codes, q.codes)


def test_qzo_clips_by_default():
    """At the authors' 100."""
    q = {"scales": jnp.ones(3)}
    step = jax.jit(lambda q: zo.qzo_step(lambda q: 1e4 * jnp.sum(q["scales"]), q, KEY, learning_rate=1e-3,
                                         epsilon=1e-3)[1])  # fmt: skip
    assert abs(step(q).slope) == 100


def test_qzo_tunes_the_scales_of_codebooks():
    """AQLM's form: w = scale * (codebook 1[code 1] + codebook 2[code 2]); codes and codebooks stay."""
    rng = np.random.default_rng(0)
    books = jnp.asarray(rng.standard_normal((2, 16, 4)), jnp.float32)
    codes = jnp.asarray(rng.integers(16, size=(2, 6, 2)), jnp.int32)
    params = {"codes": codes, "codebooks": books, "scales": jnp.ones((6, 1))}

    def weights(p):
        return p["scales"] * jnp.concatenate(
            [sum(p["codebooks"][b][p["codes"][b, :, g]] for b in range(2)) for g in range(2)], axis=1
        )

    target = jax.jit(lambda p: 1.5 * weights(p))(params)

    def step(p, key):
        return zo.qzo_step(lambda p: jnp.mean((weights(p) - target) ** 2), p, key, learning_rate=0.05,
                           epsilon=1e-3)  # fmt: skip

    keys = jax.random.split(jax.random.key(0), 200)
    after, info = jax.jit(lambda p: jax.lax.scan(step, p, keys))(params)
    losses = np.asarray(info.loss)
    assert losses[-1] < 0.1 * losses[0]
    np.testing.assert_array_equal(after["codebooks"], books)
    np.testing.assert_array_equal(after["codes"], codes)
