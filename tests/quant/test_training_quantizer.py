"""The block quantizer: legal values, unbiased rounding, and the gradients of every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.formats import Minifloat
from frugax.quant.training import Recipe, quantize_blocks, quantizer_vjp
from frugax.quant.training.hadamard import hadamard_matrix, rotate, rotation
from frugax.quant.training.rounding import curve, rounding_slope
from tests.errors import assert_close
from tests.quant.training_definition import ELEMENTS, SCALES, round_blocks, scales_of

FP4 = Minifloat.of(2, 1)
KEY = jax.random.key(5)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def blocks(shape=(5, 3, 16), seed=0, spread=4.0):
    """Blocks of different sizes, one of them zeros."""
    keys = jax.random.split(jax.random.key(seed))
    size = jnp.exp(spread * jax.random.normal(keys[0], (*shape[:-1], 1), jnp.float32))
    return (jax.random.normal(keys[1], shape, jnp.float32) * size).at[0, 0].set(0.0)


@functools.partial(jax.jit, static_argnums=1)
def rounded(x, recipe, key=None):
    return quantize_blocks(x, FP4, recipe, key=key)


pulled_back = jax.jit(quantizer_vjp, static_argnums=(2, 3))


@pytest.mark.parametrize("scale", ["e8m0", "e4m3", "ue5m3", "float32"])
def test_elements_and_scales_are_legal_and_the_nearest(scale):
    tensor_scale = scale in ("e4m3", "ue5m3")
    recipe = Recipe(block_size=16, scale=scale, tensor_scale=tensor_scale)
    x = blocks()
    for key in (None, jax.random.key(1)):
        q = rounded(x, recipe, key)
        assert set(np.abs(np.unique(q.elements))) <= set(ELEMENTS["fp4_e2m1"])
        assert scale == "float32" or set(np.unique(q.scales)) <= set(SCALES[scale].astype(np.float32))
        assert len(np.unique(q.scales)) > 3
        if key is not None:  # scales are rounded up: nothing saturates
            assert (np.abs(x) <= 6 * q.scales * q.outer * (1 + 2e-7)).all()
    q = rounded(x, recipe, None)
    amax = np.maximum(np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True), 1e-30)
    wanted, outer = scales_of(amax, "fp4_e2m1", scale, tensor_scale)
    is_some = np.asarray(x).any(-1, keepdims=True)
    np.testing.assert_allclose(q.outer, outer, rtol=1e-6)
    np.testing.assert_allclose(q.scales * is_some, wanted * is_some, rtol=1e-6)
    whole = np.asarray(q.elements * q.scales * q.outer).reshape(5, 48)
    assert_close(
        whole, round_blocks(x.reshape(5, 48) + 1e-30, "fp4_e2m1", scale, 16, tensor_scale), "float32"
    )


@pytest.mark.parametrize("scale", ["e8m0", pytest.param("e4m3", marks=pytest.mark.full)])
def test_stochastic_rounding_is_unbiased(scale):
    recipe = Recipe(block_size=16, scale=scale, tensor_scale=scale == "e4m3")
    x = blocks((1, 4, 16), spread=1.0)
    draws = 4096

    @jax.jit
    def draw(keys):
        def one(key):
            q = quantize_blocks(x, FP4, recipe, key=key)
            return q.elements * q.scales * q.outer

        return jax.vmap(one)(keys)

    found = np.asarray(draw(jax.random.split(jax.random.key(2), draws)), np.float64)
    deviation = found.std(0)
    assert (deviation > 0).mean() > 0.7  # not in the block of zeros
    wrong = np.abs(found.mean(0) - x) / np.maximum(deviation / draws**0.5, 1e-6 * np.abs(x) + 1e-9)
    assert wrong.max() < 5
    nearest = rounded(x, recipe)
    assert np.abs(nearest.elements * nearest.scales * nearest.outer - x).max() > 0.05


@pytest.mark.nan
def test_bad_blocks_become_nan_and_spoil_no_other():
    x = blocks().at[1, 1, 3].set(jnp.nan).at[2, 0, 5].set(jnp.inf)
    for recipe in (Recipe(block_size=16), Recipe(block_size=16, scale="e4m3")):
        q = rounded(x, recipe)
        bad = np.isnan(q.elements * q.scales * q.outer)
        assert bad[1, 1].all()
        assert bad[2, 0].all()
        assert bad.sum() == 32


@pytest.mark.parametrize("name", ["power", "spline"])
def test_the_slope_of_rounding_is_that_of_its_curve(name):
    t = np.linspace(0.03, 0.43, 9)  # the power's slope is cut in the middle
    t = np.concatenate([t, 1 - t]).astype(np.float32)
    slope, step_curve = jax.jit(rounding_slope, static_argnums=(1, 2)), jax.jit(curve, static_argnums=1)
    for low, high in ((0.0, 0.5), (2.0, 3.0), (4.0, 6.0)):
        step = 1e-2
        by_differences = (step_curve(t + step / 2, name) - step_curve(t - step / 2, name)) / step
        for sign in (1, -1):
            found = slope(sign * (low + (high - low) * t), FP4, name)
            np.testing.assert_allclose(found, by_differences, rtol=2e-2)
    assert step_curve(np.float32([0.0, 0.5, 1.0] * 6), name)[:3].tolist() == [0.0, 0.5, 1.0]
    beyond_and_middle = np.float32([6.5, -9.0, 2.5] * 6)
    expected = [0.0, 0.0, {"power": 3.0, "spline": 1.5}[name]]
    np.testing.assert_allclose(slope(beyond_and_middle, FP4, name)[:3], expected, rtol=1e-6)


OPTIONS = [
    ("straight_through", True),
    ("spline", True),
    *(
        pytest.param(name, by_scale, marks=pytest.mark.full)
        for name, by_scale in (
            ("straight_through", False),
            ("spline", False),
            ("power", False),
            ("power", True),
        )
    ),
]


@pytest.mark.parametrize(("name", "by_scale"), OPTIONS)
def test_the_gradient_is_that_of_the_curve_and_of_the_scale(name, by_scale):
    """Autodiff of s h(x / s), where h has the values of rounding and the slope of the curve."""
    recipe = Recipe(block_size=16, scale="ue5m3", rounding_gradient=name, scale_gradient=by_scale)
    x, upstream = blocks(spread=0.5)[1:], blocks(seed=3, spread=0.5)[1:]

    @jax.jit
    def by_autodiff(x):
        q = quantize_blocks(x, FP4, recipe)
        wanted = jnp.max(jnp.abs(x), -1, keepdims=True) / 6
        s = q.scales + (wanted - jax.lax.stop_gradient(wanted) if by_scale else 0.0)
        u = x / s
        values = jnp.asarray([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.float32)
        at = jnp.clip(jnp.searchsorted(values, jax.lax.stop_gradient(u)), 1, 14)
        gap = values[at] - values[at - 1]
        t = (u - values[at - 1]) / gap
        if name == "straight_through":
            h = u
        else:
            h = jnp.where((t >= 0) & (t <= 1), gap * curve(jnp.clip(t, 1e-6, 1 - 1e-6), name), 0.0)
        h = h + jax.lax.stop_gradient(q.elements - h)
        return jnp.sum(upstream * s * h)

    expected = jax.grad(by_autodiff)(x)
    found = pulled_back(x, upstream, FP4, recipe)
    if name == "power":  # cut at 3, which autodiff doesn't know; few are that steep
        near = np.abs(found - expected) <= 1e-3 * np.abs(expected) + 1e-5
        assert near.mean() > (0.55 if by_scale else 0.9)
    else:
        assert_close(found, expected, "float32", times=16)


@pytest.mark.parametrize("name", [pytest.param("straight_through", marks=pytest.mark.full), "power"])
def test_scaling_a_block_scales_its_values(name):
    """f(c x) = c f(x) for a float32 scale: by Euler, <f'(x)^T v, x> = <v, f(x)>, whatever the slope is."""
    x, v = blocks(spread=0.5), blocks(seed=3, spread=0.5)
    for size in (16, None):
        recipe = Recipe(block_size=size, scale="float32", rounding_gradient=name, scale_gradient=True)
        q = rounded(x, recipe)
        f = q.elements * q.scales * q.outer
        gradient = pulled_back(x, v, FP4, recipe)
        axes = -1 if size else None
        assert_close(jnp.sum(gradient * x, axes), jnp.sum(v * f, axes), "float32", times=16)


def test_rotations_are_orthogonal_and_spread_outliers():
    h = hadamard_matrix(16)
    assert set(np.abs(h).ravel()) == {0.25}
    assert_close(h @ h.T, np.eye(16), "float32")
    turn = rotation(16, KEY)
    assert not np.array_equal(turn, rotation(16, None))
    assert_close(turn @ turn.T, np.eye(16), "float32")
    outlier = blocks((8, 4, 16), spread=0.0)[1:].at[..., 7].mul(30.0)
    spread = rotate(outlier, turn)
    assert_close(rotate(spread, turn.T), outlier, "float32")
    assert jnp.mean(jnp.max(jnp.abs(spread), -1)) < 0.5 * jnp.mean(jnp.max(jnp.abs(outlier), -1))
