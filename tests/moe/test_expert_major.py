"""Experts one by one: the token-major sum bit for bit, each loaded once, weights of two at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import formats, moe

T, E, D, H = 23, 6, 5, 7
RNG = np.random.default_rng(0)
# Small whole numbers and weights that are halves: every product and sum is exact, in any order.
X = RNG.integers(-4, 5, (T, D)).astype(np.float32)
PARAMS = {
    "in": RNG.integers(-3, 4, (E, D, H)).astype(np.float32),
    "out": RNG.integers(-3, 4, (E, H, D + 1)).astype(np.float32),
}
CHOICES = np.stack([RNG.permutation(E - 1)[:3] for _ in range(T)])  # nobody chooses the last expert
WEIGHTS = RNG.choice([0.5, 0.25, 1.5], (T, 3)).astype(np.float32)
WEIGHTS[4] = 0  # a token without experts


def expert(params, rows):
    return jax.nn.relu(rows @ params["in"]) @ params["out"]


@functools.cache
def statistics():
    return jax.jit(lambda x: moe.softmax_top_k(x, 3))(np.zeros((T, E), np.float32)).statistics


def routing(choices=CHOICES, weights=WEIGHTS):
    return moe.Routing(jnp.asarray(choices, jnp.int32), jnp.asarray(weights), {}, statistics(), E)


def token_by_token(choices=CHOICES) -> np.ndarray:
    y = np.zeros((T, D + 1))
    for t in range(T):
        for e, weight in zip(choices[t], WEIGHTS[t], strict=True):
            hidden = np.maximum(X[t].astype(np.float64) @ PARAMS["in"][e], 0)
            y[t] += weight * (hidden @ PARAMS["out"][e])
    return y


@pytest.mark.parametrize("tile", [pytest.param(1, marks=pytest.mark.full), 4, 128])
def test_it_is_the_token_major_sum_and_loads_each_expert_once(tile):
    loads = []

    def load(e):
        jax.debug.callback(lambda e: loads.append(int(e)), e)
        return jax.tree.map(lambda w: jnp.asarray(w)[e], PARAMS)

    run = jax.jit(lambda x, routing: moe.expert_by_expert(expert, load, x, routing, tile=tile))
    want = token_by_token()
    np.testing.assert_array_equal(run(X, routing()), want)
    assert np.abs(want).max() > 10
    jax.effects_barrier()
    assert loads == list(range(E - 1))
    loads.clear()
    one = np.full_like(CHOICES, 2)
    np.testing.assert_array_equal(run(X, routing(one)), token_by_token(one))
    jax.effects_barrier()
    assert loads == [2]


def test_weights_of_two_experts_are_at_hand():
    """By the compiler's account, which doesn't grow with the number of experts."""
    D, H, T = 64, 128, 32
    one = 2 * D * H * 4

    def held(E):
        shapes = {"in": (E, D, H), "out": (E, H, D)}
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        x, logits = (jax.ShapeDtypeStruct((T, n), jnp.float32) for n in (D, E))

        def run(params, x, logits):
            return moe.expert_by_expert(expert, params, x, moe.softmax_top_k(logits, 2), tile=16)

        memory = jax.jit(run).lower(params, x, logits).compile().memory_analysis()
        assert memory.argument_size_in_bytes > E * one
        return memory.temp_size_in_bytes

    few, many = held(4), held(40)
    assert many - few < one / 16
    assert many < 2.8 * one  # two experts, the queue of tokens and its outputs


def test_packed_experts_stay_packed():
    """int8 of whole numbers below 128 with a scale of 1 is exact."""
    w = np.clip(PARAMS["in"], -3, 3)
    w[:, 0] = 127  # each group's scale is then 1
    packed = jax.jit(lambda w: formats.quantize(w, "int8", axis=-2))(w)
    multiply = lambda w, rows: rows @ w.dequantize(jnp.float32)  # noqa: E731
    out = jax.jit(lambda *args: moe.expert_by_expert(multiply, *args))(packed, X, routing())
    want = sum(WEIGHTS[:, i, None] * np.einsum("td,tdh->th", X, w[CHOICES[:, i]]) for i in range(3))
    np.testing.assert_allclose(out, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("params", "tile", "says"),
    [
        (PARAMS, 0, "tile: got 0"),
        (
            {"in": PARAMS["in"][1:], "out": PARAMS["out"]},
            4,
            r"params\['in'\]: got \[5, 5, 7\]; expected \[6 exp",
        ),
    ],
)
def test_bad_input(params, tile, says):
    with pytest.raises(ValueError, match=says):
        moe.expert_by_expert(expert, params, jnp.asarray(X), routing(), tile=tile)
