"""The low-bit matrix product: all three products by their definition, histories, and bad input."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from frugax.quant.training import AmaxHistory, Recipe, init_history, low_bit_dot, recipe_named
from tests.errors import assert_close, error
from tests.quant.training_definition import round_blocks

M, K, N = 13, 37, 22  # no multiple of a block
KEY = jax.random.key(7)
dot = jax.jit(low_bit_dot, static_argnums=2)


@pytest.fixture(scope="module")
def arrays():
    """x, w and the output's gradient, which is small."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((M, K), (K, N), (M, N))
    return [jax.random.normal(k, s) * a for k, s, a in zip(keys, shapes, (1, 0.2, 1e-3), strict=True)]


def products(x, w, dy, recipe, key=None, history=None):
    """x w, and what the backward products give for dy."""

    @jax.jit
    def run(x, w, dy, key, history):
        y, vjp = jax.vjp(lambda x, w, h: low_bit_dot(x, w, recipe, key=key, history=h), x, w, history)
        return y, *vjp(dy)

    return run(x, w, dy, key, history)


BY_DEFINITION = {
    "e4m3": Recipe(block_size=16, scale="e4m3", tensor_scale=True, stochastic=False),
    "e8m0": Recipe(stochastic=False),
    "fp8": Recipe("fp8_e4m3", "fp8_e5m2", None, "float32", stochastic=False),
}


@pytest.mark.parametrize("name", ["e4m3", pytest.param("e8m0", marks=pytest.mark.full), "fp8"])
def test_three_products_of_rounded_operands(arrays, name):
    x, w, dy = arrays
    recipe = BY_DEFINITION[name]
    forward, backward = recipe.forward, recipe.gradient

    def rounded(a, element=forward):
        return round_blocks(a, element, recipe.scale, recipe.block_size, recipe.tensor_scale)

    y, dx, dw, _ = products(x, w, dy, recipe)
    assert_close(y, rounded(x) @ rounded(w.T).T, "float32")
    assert_close(dx, rounded(dy, backward) @ rounded(w).T, "float32")
    assert_close(dw, rounded(x.T) @ rounded(dy.T, backward).T, "float32")


def test_fp8_is_the_cast_of_ml_dtypes(arrays):
    x, w, _ = arrays
    scales = [np.abs(a).max() / np.float32(448) for a in map(np.asarray, (x, w))]
    cast = [
        (np.asarray(a) / s).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        for a, s in zip((x, w), scales, strict=True)
    ]
    expected = cast[0] @ cast[1] * scales[0] * scales[1]
    assert_close(dot(x, w, "fp8_current"), expected, "float32")


def test_hadamard_is_exact_before_rounding(arrays):
    x, w, dy = arrays
    exact = (x @ w, dy @ w.T, x.T @ dy)
    assert_close(products(x, w, dy, Recipe(None, None, 16, hadamard=True), KEY)[:3], exact, "float32")
    rounds = Recipe("fp4_e2m1", None, 16, hadamard=True)
    found = products(x, w, dy, rounds, KEY)[:3]
    plain = products(x, w, dy, Recipe("fp4_e2m1", None, 16), KEY)[:3]
    for a, b, e in zip(found, plain, exact, strict=True):
        assert 0.02 < error(a, e) < 0.3
        assert error(a, b) > 0.02


@pytest.mark.parametrize("rounding_gradient", ["power", pytest.param("spline", marks=pytest.mark.full)])
def test_the_gradient_goes_through_turned_and_rounded_operands(arrays, rounding_gradient):
    """With float32 scales f(c x) = c f(x), so by Euler <dx, x> = <dy, y> = <dw, w>, rotations and all."""
    x, w, dy = arrays
    recipe = Recipe(
        "fp4_e2m1", None, 16, "float32",
        hadamard=True, rounding_gradient=rounding_gradient, scale_gradient=True,
    )  # fmt: skip
    y, dx, dw, _ = products(x, w, dy, recipe, KEY)
    assert_close(jnp.vdot(dx, x), jnp.vdot(dy, y), "float32", times=16)
    assert_close(jnp.vdot(dw, w), jnp.vdot(dy, y), "float32", times=16)
    straight = products(x, w, dy, Recipe("fp4_e2m1", None, 16, "float32", hadamard=True), KEY)
    assert error(dx, straight[1]) > 0.1


def test_gradients_are_unbiased_where_rounding_is(arrays):
    x, w, dy = arrays
    recipe = Recipe(None, "fp4_e2m1", hadamard=True)  # the gradient alone is rounded

    @jax.jit
    def draws(keys):
        return jax.vmap(lambda key: jax.vjp(lambda x: low_bit_dot(x, w, recipe, key=key), x)[1](dy)[0])(keys)

    found = np.asarray(draws(jax.random.split(KEY, 512)), np.float64)
    mean, one = error(found.mean(0), dy @ w.T), error(found[0], dy @ w.T)
    assert 0.05 < one < 0.5
    assert mean < 2 * one / 512**0.5


@pytest.mark.nan
def test_delayed_scaling_reads_the_past_and_writes_the_present(arrays):
    x, w, dy = arrays
    recipe = Recipe("fp8_e4m3", "fp8_e5m2", None, "float32", stochastic=False, history=3)
    current = products(x, w, dy, "fp8_current")
    run = jax.jit(functools.partial(products, recipe=recipe))
    *first, history = run(x, w, dy, history=init_history(recipe))
    assert_close(first, list(current[:3]), "float32")  # nothing is known: its own largest magnitudes
    assert history.x.tolist() == [np.float32(jnp.max(jnp.abs(x))), 0, 0]
    assert history.gradient.tolist() == [np.float32(jnp.max(jnp.abs(dy))), 0, 0]
    # Four times as large: what is beyond the past's largest saturates, now, and not in the next step.
    y, _, _, history = run(4 * x, w, dy, history=history)
    limit = jnp.max(jnp.abs(x))
    assert_close(y, dot(jnp.clip(4 * x, -limit, limit), w, "fp8_current"), "float32")
    y, dx, _, after = run(4 * x, w, dy.at[0, 0].set(jnp.nan), history=history)
    assert_close(y, 4 * first[0], "float32")
    assert bool(jnp.isnan(dx[0]).all())
    assert after.gradient.tolist() == [np.float32(jnp.max(jnp.abs(dy)))] * 3  # NaN is not written
    for _ in range(3):
        history = run(x, w, dy, history=history)[-1]
    assert history.x.tolist() == [np.float32(limit)] * 3


def test_narrow_operands_hold_every_rounded_value(arrays):
    x, w, dy = (a.astype(jnp.bfloat16) for a in arrays)
    wide = [a.astype(jnp.float32) for a in (x, w, dy)]
    for recipe in ("nvfp4", "fp8_current"):
        assert_close(dot(x, w, recipe), dot(wide[0], wide[1], recipe), "bfloat16")
        text = dot.lower(x, w, recipe).as_text()
        products_of = [line for line in text.splitlines() if "dot_general" in line]
        assert products_of[-1].count("bf16") >= 2
    found = jax.eval_shape(lambda x: jax.vjp(lambda x: low_bit_dot(x, w, "nvfp4", key=KEY), x)[1](dy)[0], x)
    assert found.dtype == jnp.bfloat16


@pytest.mark.full
def test_batches_and_maps(arrays):
    x, w, _ = arrays
    xs = jnp.stack([x, 2 * x, -x])
    flat = low_bit_dot(xs, w, "mxfp4")
    assert_close(flat.reshape(-1, N), low_bit_dot(xs.reshape(-1, K), w, "mxfp4"), "float32")
    one_by_one = jnp.stack([low_bit_dot(x, w, "nvfp4") for x in xs])
    assert_close(jax.vmap(lambda x: low_bit_dot(x, w, "nvfp4"))(xs), one_by_one, "float32")
    assert_close(jax.lax.map(lambda x: low_bit_dot(x, w, "nvfp4"), xs), one_by_one, "float32")


def test_bad_input_is_named(arrays, unchecked_types):
    x, w, _ = arrays
    bad = [
        ("block_size", lambda: Recipe(block_size=0)),
        ("block_size", lambda: Recipe(block_size=24, hadamard=True)),
        ("scale", lambda: Recipe(scale="e5m3")),
        ("scale", lambda: Recipe(block_size=None)),
        ("tensor_scale", lambda: Recipe(scale="float32", tensor_scale=True)),
        ("rounding_gradient", lambda: Recipe(rounding_gradient="ste")),
        ("history", lambda: Recipe(history=4)),
        ("format", lambda: Recipe("fp5")),
        ("recipe", lambda: recipe_named("fp4")),
        ("history", lambda: low_bit_dot(x, w, "fp8_delayed")),
        ("history", lambda: low_bit_dot(x, w, "nvfp4", history=init_history("fp8_delayed"))),
        ("history", lambda: low_bit_dot(x, w, "fp8_delayed", history=AmaxHistory(*jnp.ones((3, 4))))),
        ("x", lambda: low_bit_dot(jnp.ones((2, K), int), w, "nvfp4")),
        ("w", lambda: low_bit_dot(x, w.T, "nvfp4")),
        ("key", lambda: jax.grad(lambda x: low_bit_dot(x, w, "nvfp4").sum())(x)),
    ]
    for name, call in bad:
        with pytest.raises(ValueError, match=f"^{name}: "):
            jax.eval_shape(call)
