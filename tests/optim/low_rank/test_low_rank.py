"""Projectors, refreshes and moments: what holds for the composition, whatever the optimizer."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from frugax import formats, optim
from frugax.optim import low_rank
from tests.errors import assert_close, error
from tests.optim.optimizers import gradients

KEY = jax.random.key(3)
PROJECTORS = {
    "svd": optim.SVD(3),
    "gram": optim.Gram(3),
    "randomized": optim.RandomizedSVD(3),
    "power": optim.PowerIteration(3),
    "dct": optim.DCT(3),
    "random": optim.Gaussian(3),
    "orthonormal": optim.RandomBasis(3),
    "columns": optim.Rows(3),
    "coordinates": optim.Coordinates(3),
    "blocks": optim.Slices(2),
}
ORTHONORMAL = sorted(set(PROJECTORS) - {"random"})


def at_work(p, g):
    """(down, up) of a projector after a refresh on g."""
    kept = jax.jit(lambda g: p.refresh(g, p.init(g.shape, g.dtype), KEY))(g)
    return jax.jit(lambda x: p.down(x, kept, KEY)), jax.jit(lambda r: p.up(r, g.shape, kept, KEY))


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_up_is_the_transpose_of_down(name):
    g, x = (jax.random.normal(jax.random.key(i), (4, 5, 7)) for i in range(2))
    down, up = at_work(PROJECTORS[name], g)
    r = jax.random.normal(jax.random.key(2), down(x).shape)
    assert_close(jnp.sum(down(x) * r)[None], jnp.sum(x * up(r))[None], "float32")
    if name in ORTHONORMAL:
        assert_close(down(up(r)), r, "float32")


def captured(p, g):
    down, up = at_work(p, g)
    return float(jnp.sum(up(down(g)) ** 2))


def test_what_projectors_capture():
    g = jnp.asarray(gradients((5, 9), 1)[0], jnp.float32)
    values = np.linalg.svd(np.asarray(g, np.float64))[1]
    best = (values[:3] ** 2).sum()
    np.testing.assert_allclose(captured(optim.SVD(3), g), best, rtol=1e-5)
    np.testing.assert_allclose(captured(optim.Gram(3), g), best, rtol=1e-5)
    assert 0.99 * best < captured(optim.RandomizedSVD(3, iterations=3, oversample=0), g) <= best * (1 + 1e-5)
    np.testing.assert_allclose(
        captured(optim.RandomizedSVD(3, iterations=0), g), best, rtol=1e-5
    )  # 5 of 5 tried
    assert 0.99 * best < captured(optim.PowerIteration(3, iterations=20), g) <= best * (1 + 1e-5)


@pytest.mark.parametrize("m", [5, 6])
def test_dct_takes_the_best_columns(m):
    g = gradients((m, 9), 1)[0]
    i, k = np.arange(m)[:, None], np.arange(m)
    basis = np.where(k == 0, m**-0.5, (2 / m) ** 0.5) * np.cos(np.pi * (2 * i + 1) * k / (2 * m))
    subsets = [list(s) for s in itertools.combinations(range(m), 3)]
    best = max(np.sum((basis[:, s] @ basis[:, s].T @ g) ** 2) for s in subsets)
    np.testing.assert_allclose(captured(optim.DCT(3), jnp.asarray(g, jnp.float32)), best, rtol=1e-5)


def test_a_gradient_of_low_rank_loses_nothing():
    g = jnp.asarray(gradients((5, 2), 1)[0] @ gradients((2, 7), 1)[0], jnp.float32)
    for p in (optim.SVD(2), optim.Gram(2), optim.RandomizedSVD(2), optim.PowerIteration(2)):
        down, up = at_work(p, g)
        assert_close(up(down(g)), g, "float32")


def test_random_projections_keep_norms_on_average():
    g = jnp.ones((5, 3))
    norms = jax.vmap(lambda key: jnp.sum(optim.Gaussian(4).down(g, (), key) ** 2, axis=0))(
        jax.random.split(KEY, 4000)
    )
    # (|Px|^2 / |x|^2) * 4 is chi squared of 4: a mean of 4000 has a standard error of sqrt(2 / 4 / 4000).
    np.testing.assert_allclose(norms.mean(axis=0), 5.0, rtol=4 * (0.5 / 4000) ** 0.5)


@pytest.mark.parametrize("side", ["short", "long"])
def test_sgd_in_a_whole_basis_is_sgd(side):
    tree = {"a": {"kernel": jnp.asarray(gradients((5, 5), 1)[0], jnp.float32)}}
    opt = low_rank(optim.SVD(5), optax.identity(), side=side)
    assert_close(opt.update(tree, opt.init(tree))[0], tree, "float32")


def test_apollo_that_projects_nothing_is_adam_by_channel():
    g = jnp.asarray(gradients((5, 7), 1)[0], jnp.float32)
    opt = optim.apollo(1.0, rank=5, projector="columns")  # all five: the identity
    adam = optax.adam(1.0)
    got = opt.update({"w": g}, opt.init({"w": g}))[0]["w"]
    u = adam.update(g, adam.init(g))[0]
    assert_close(got, -g * (jnp.linalg.norm(u, axis=0) / jnp.linalg.norm(g, axis=0))[None], "float32")


def test_apollo_scales_concentrate_with_rank():
    """Over Adam's own scale times sqrt(rank / m), each channel's has mean 1 and a spread of 1 / sqrt(2 rank):
    at the first step |Adam(P g)| / |Adam(g)| is sqrt(rank / m), and |g|^2 / |P g|^2 is rank over chi squared.
    """
    m, n = 200, 256
    g = jnp.asarray(gradients((m, n), 1)[0], jnp.float32)
    for rank in (16, 64):
        opt = optim.apollo(1.0, rank=rank, limit=None)
        update = opt.update({"w": g}, opt.init({"w": g}))[0]["w"]
        ratio = np.asarray(jnp.linalg.norm(update, axis=0)) / m**0.5 / (rank / m) ** 0.5
        # A root's mean is 1 + 3 / 4 rank; channels share one P, whose square is off by sqrt(2 / m rank).
        assert abs(ratio.mean() - 1) < 1 / rank + 4 * (1 / (2 * rank * n) + 2 / (m * rank)) ** 0.5
        assert 0.85 < ratio.std() * (2 * rank) ** 0.5 < 1.3


def primitives(jaxpr, inside=False):
    """(name, whether it is inside a conditional) of everything that a jaxpr does."""
    is_jaxpr = lambda x: isinstance(x, core.ClosedJaxpr | core.Jaxpr)  # noqa: E731
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from primitives(
                    getattr(value, "jaxpr", value), inside or equation.primitive.name == "cond"
                )


@pytest.mark.parametrize(
    "opt",
    [
        optim.galore(1e-3, rank=2),
        optim.galore(1e-3, rank=2, projector="randomized", moments="transport"),
        optim.q_galore(1e-3, rank=2),
    ],
)
def test_no_decomposition_outside_of_a_refresh(opt):
    tree = {"w": jnp.ones((3, 4, 6))}
    found = list(primitives(jax.make_jaxpr(opt.update)(tree, opt.init(tree)).jaxpr))
    dear = [
        (name, inside)
        for name, inside in found
        if name in ("svd", "eigh", "geqrf", "qr", "householder_product")
    ]
    assert dear
    assert all(inside for _, inside in dear)


def refreshes(opt, leaves, steps):
    """For each leaf the steps at which its projector changed."""
    keys = jax.random.split(KEY, steps)
    state = opt.init({name: jnp.zeros((4, 6)) for name in leaves})
    update = jax.jit(opt.update)
    found = {name: [] for name in leaves}
    for step in range(steps):
        before = state
        draw = jax.random.split(keys[step], len(leaves))
        _, state = update({n: jax.random.normal(k, (4, 6)) for n, k in zip(leaves, draw, strict=True)}, state)
        for name in leaves:
            if (state.leaves[name].projector != before.leaves[name].projector).any():
                found[name].append(step)
    return found


def test_refreshes_together_and_staggered():
    spec = optim.MatrixSpec(names="a|b|c")
    together = low_rank(optim.SVD(2), optax.identity(), spec=spec, refresh=6)
    assert refreshes(together, "abc", 14) == {n: [0, 6, 12] for n in "abc"}
    staggered = low_rank(optim.SVD(2), optax.identity(), spec=spec, refresh=optim.Refresh(6, stagger=True))
    assert refreshes(staggered, "abc", 14) == {"a": [0, 6, 12], "b": [0, 4, 10], "c": [0, 2, 8]}


def test_adaptive_refreshes_slice_by_slice():
    """A slice whose subspace rests is looked at ever less; one whose subspace moves, as often as at first."""
    opt = low_rank(optim.SVD(1), optax.identity(), refresh=optim.Refresh(2, threshold=0.9, queue=2))
    rng = np.random.default_rng(0)
    state, update = opt.init({"w": jnp.zeros((2, 4, 6))}), jax.jit(opt.update)
    fixed = np.outer(rng.normal(size=4), rng.normal(size=6))
    directions = np.eye(4)
    changed = []
    for step in range(30):
        moving = np.outer(directions[step // 2 % 4], rng.normal(size=6))
        before = state.leaves["w"].waiting.next
        g = np.stack([fixed * rng.normal(), moving]).astype(np.float32)
        updates, state = update({"w": jnp.asarray(g)}, state)
        assert_close(updates["w"][0], g[0], "float32")  # of rank one: nothing is lost
        changed.append(np.asarray(state.leaves["w"].waiting.next != before))
    still, restless = (np.flatnonzero(column).tolist() for column in np.stack(changed, axis=1))
    assert still == [
        0,
        2,
        4,
        8,
        16,
    ]  # the first has nothing to compare with; then the interval doubles each time
    assert restless == list(range(0, 30, 2))


def test_moments_at_a_refresh():
    """Kept as numbers, set to zero, or kept as the directions they stand for."""
    first, second = (jnp.asarray(g, jnp.float32) for g in gradients((4, 6), 2))
    after = {}
    for moments in ("keep", "reset", "transport"):
        opt = low_rank(optim.SVD(4), optax.scale_by_adam(), refresh=1, moments=moments)
        state = opt.init({"w": first})
        _, state = opt.update({"w": first}, state)
        old = state.leaves["w"]
        _, state = opt.update({"w": second}, state)
        after[moments] = state.leaves["w"]
    p, q = old.projector, after["keep"].projector
    fresh = 0.1 * q.T @ second
    assert_close(after["keep"].inner.mu, 0.9 * old.inner.mu + fresh, "float32")
    assert_close(after["reset"].inner.mu, fresh, "float32")
    assert int(after["reset"].inner.count) == 1
    assert_close(q @ after["transport"].inner.mu, 0.9 * p @ old.inner.mu + q @ fresh, "float32")
    c = q.T @ p
    assert_close(
        after["transport"].inner.nu, 0.999 * (c * c) @ old.inner.nu + 0.001 * (q.T @ second) ** 2, "float32"
    )


@pytest.mark.parametrize(
    "inner",
    [
        optim.quantized_state(optax.scale_by_adam(), {"mu": "dynamic8", "nu": "udynamic8"}, min_size=1),
        optim.scale_by_adam_8bit(moments=optim.EightBit(min_size=1)),
    ],
)
def test_moments_in_codes_are_transported_as_what_they_stand_for(inner):
    first, second = (jnp.asarray(g, jnp.float32) for g in gradients((4, 6), 2))
    opt = low_rank(optim.SVD(4), inner, refresh=1, moments="transport")
    is_codes = lambda x: isinstance(x, formats.QuantizedTensor)  # noqa: E731

    def moments(leaf):
        return [x.dequantize() for x in jax.tree.leaves(leaf.inner, is_leaf=is_codes) if is_codes(x)]

    _, before = opt.update({"w": first}, opt.init({"w": first}))
    _, after = opt.update({"w": second}, before)
    before, after = before.leaves["w"], after.leaves["w"]
    m, v = moments(before)
    c, r = after.projector.T @ before.projector, after.projector.T @ second
    assert error(jnp.eye(4), jnp.abs(c)) > 0.1  # the basis turned
    got_m, got_v = moments(after)
    # Codes twice, of which the coarsest are 1 / 50 of a row's largest value apart.
    assert jnp.abs(got_m - (0.9 * c @ m + 0.1 * r)).max() < 0.02 * jnp.abs(got_m).max()
    assert jnp.abs(got_v - (0.999 * (c * c) @ v + 0.001 * r * r)).max() < 0.02 * jnp.abs(got_v).max()


def test_a_history_of_gradients_is_transported():
    """A stack of two, whose projected gradients of the first step turn with the basis at the second."""
    first, second = (jnp.asarray(g, jnp.float32) for g in gradients((2, 4, 6), 2))
    opt = low_rank(optim.SVD(4), optim.scale_by_fisher(history=3), refresh=1, moments="transport")
    _, before = opt.update({"w": first}, opt.init({"w": first}))
    _, after = opt.update({"w": second}, before)
    old, new = before.leaves["w"], after.leaves["w"]
    history = new.inner.history
    assert_close(new.projector @ history[:, 0], old.projector @ old.inner.history[:, 0], "float32")
    assert_close(history[:, 1], jnp.swapaxes(new.projector, 1, 2) @ second, "float32")
    assert not history[:, 2].any()


def test_draws_depend_on_seed_leaf_and_turn():
    def rows(seed, path, step):
        opt = low_rank(
            optim.Rows(3), optax.identity(), refresh=4, seed=seed, spec=optim.MatrixSpec(names=".*")
        )
        g = {path: jnp.ones((40, 50))}
        state = opt.init(g)._replace(step=jnp.asarray(step))
        return np.flatnonzero(np.asarray(opt.update(g, state)[0][path])[:, 0]).tolist()

    base = rows(0, "a", 0)
    assert base == rows(0, "a", 3)
    assert len({tuple(r) for r in (base, rows(1, "a", 0), rows(0, "b", 0), rows(0, "a", 4))}) == 4


def test_q_galore_trains_int8_weights_that_rounding_to_nearest_leaves_alone():
    """Steps of about 0.002 on a grid of 4 / 127 = 0.03: rounding to nearest undoes each of them."""
    target = jax.random.normal(jax.random.key(1), (16, 32))
    opt = optim.q_galore(2e-3, rank=8, update_interval=20, scale=1.0)
    start = formats.quantize(
        jnp.zeros_like(target).at[0].set(4.0), "int8"
    )  # a 4 in every column sets its grid
    gradient = lambda w: {"w": (w.dequantize() - target).at[0].set(0)}  # noqa: E731

    @jax.jit
    def step(carry, key):
        w, state, nearest, its_state = carry
        updates, state = opt.update(gradient(w), state)
        w = optim.apply_updates_stochastic(w, updates["w"].at[0].set(0), key)
        updates, its_state = opt.update(gradient(nearest), its_state)
        nearest = formats.quantize(nearest.dequantize() + updates["w"].at[0].set(0), "int8")
        return (w, state, nearest, its_state), None

    state = opt.init({"w": target})
    carry = (start, state, start, state)
    (w, _, nearest, _), _ = jax.lax.scan(step, carry, jax.random.split(KEY, 400))
    loss = lambda w: float(jnp.mean((w.dequantize() - target)[1:] ** 2))  # noqa: E731
    assert loss(w) < 0.7 * loss(start)
    assert loss(nearest) > 0.95 * loss(start)
