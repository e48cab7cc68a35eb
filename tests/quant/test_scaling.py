"""Scales by channel, ranges and AWQ: the function stays, and errors are those of searches in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.formats import quantize
from frugax.formats.named import BY_NAME
from frugax.quant import (
    Statistics,
    awq,
    awq_scale,
    clip_weights,
    divide_outputs,
    equalization_scale,
    gptq,
    multiply_inputs,
    output_error,
    smoothquant_scale,
)
from tests.errors import assert_close
from tests.quant import definition

K, G = 13, 5
DEAD = definition.inputs(40, K)
X = DEAD + np.where(np.arange(K) == 2, 0.1, 0).astype(np.float32)
PAIR = [jnp.asarray(definition.weights(K, n, seed=n)) for n in (3, 4)]  # two matrices that share an input
FORMATS = [
    f if f in ("int3", "nvfp4") else pytest.param(f, marks=pytest.mark.full)
    for f, format in BY_NAME.items()
    if format.signed and not format.paired
]


def of(x):
    return Statistics.of(jnp.asarray(x))


def squared(pair, scale=1.0):
    """Squared errors of the outputs of both matrices, of Q / s."""
    q = [np.asarray(q.dequantize(), np.float64) / np.reshape(scale, (-1, 1)) for q in pair]
    return sum(((X @ (w - np.asarray(q))) ** 2).sum() for w, q in zip(PAIR, q, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_awq_is_a_search_and_never_worse_than_the_nearest(format):
    g = None if format == "ternary" else G  # which has one scale a matrix
    search = functools.partial(awq, PAIR, of(X), format, group_size=g, grid=5)
    clipped, unclipped = search(), search(clip=False)
    want = definition.awq([np.asarray(w) for w in PAIR], X, format, g or K, 5)
    np.testing.assert_allclose(unclipped.scale, want, rtol=1e-5)
    errors = [squared(found.weights, found.scale) for found in (clipped, unclipped)]
    nearest = squared([quantize(w, format, group_size=g) for w in PAIR])
    assert errors[0] <= errors[1] * (1 + 1e-4) <= nearest * (1 + 2e-4)
    if format == "int3":
        assert errors[0] < 0.8 * nearest


@pytest.mark.nan
def test_awq_of_stacked_matrices_dead_channels_and_statistics_that_are_not_finite():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), of(X), of(DEAD), of(0 * X), of(X * np.inf))
    w = jnp.stack([PAIR[0]] * 4)
    found = jax.jit(lambda w, s: awq(w, s, "int3", group_size=G, grid=5))(w, stacked)
    alone = awq(PAIR[0], of(X), "int3", group_size=G, grid=5)
    assert_close(found.scale[0], alone.scale, "float32")
    assert_close(found.weights.dequantize()[0], alone.weights.dequantize(), "float32")
    assert found.scale[1, 2] == 1
    assert np.isfinite(found.weights.dequantize()[:3]).all()
    assert np.isnan(found.weights.dequantize()[3]).all()
    np.testing.assert_array_equal(found.scale[2], 1)
    np.testing.assert_array_equal(
        found.weights.dequantize()[2], quantize(PAIR[0], "int3", group_size=G).dequantize()
    )


def test_gptq_comes_after_any_scale():
    w, errors = PAIR[0], {}
    scales = {"none": jnp.ones(K), "awq": awq_scale(w, of(X), "int3", group_size=G, grid=5)}
    for name, s in scales.items():
        q = gptq(multiply_inputs(w, s), of(X).divided(s), "int3", group_size=G)
        errors[name] = definition.error(w, q.dequantize() / s[:, None], X)
        np.testing.assert_allclose(
            output_error(w, q.dequantize() / s[:, None], of(X)), errors[name], rtol=1e-3
        )
    assert errors["awq"] < definition.error(w, quantize(w, "int3", group_size=G).dequantize(), X)
    assert_close(of(X).divided(s), of(X / np.asarray(s)), "float32")


@pytest.mark.parametrize(
    ("stats", "format"), [(of(X), "int3"), (None, "bipolar2")], ids=["outputs", "weights"]
)
def test_ranges_are_those_of_a_search(stats, format):
    w, steps, least = PAIR[0], 4, 0.5
    got = clip_weights(w, stats, format, group_size=G, steps=steps, least=least)
    wide = np.asarray(w, np.float64)
    x = X.astype(np.float64) if stats is not None else np.eye(K)
    want, plain = wide.copy(), definition.nearest(wide, format, G)
    for n in range(wide.shape[1]):
        for start in range(0, K, G):
            rows = slice(start, start + G)
            group, best = wide[rows, n : n + 1], np.inf
            for i in range(steps):
                limit = np.abs(group).max() * (1 - (1 - least) * i / (steps - 1))
                tried = np.clip(group, -limit, limit)
                d = definition.nearest(np.pad(tried, [(0, G - len(group)), (0, 0)]), format, G)[: len(group)]
                error = ((x[:, rows] @ (d - group)) ** 2).sum()
                if error < best:
                    best, want[rows, n] = error, tried[:, 0]
        q = definition.nearest(want[:, n : n + 1], format, G)[:, 0]
        if np.linalg.norm(x @ (q - wide[:, n])) >= np.linalg.norm(x @ (plain[:, n] - wide[:, n])):
            want[:, n] = wide[:, n]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (got != w).any()


@pytest.mark.parametrize("rule", ["smoothquant", "awq"])
def test_scales_are_folded_into_a_norm_and_a_glu(rule):
    """x / s comes of the norm's weight, or of the values of the matrix before, and s W makes up for it."""
    norm, glu = frugax.layers.RMSNorm(), frugax.layers.GLU(expand=2)
    sizes = jnp.exp(jax.random.normal(jax.random.key(3), (K,), jnp.float32))
    x = jax.random.normal(jax.random.key(0), (2, 7, K), jnp.float32) * sizes[None, None]
    params = {
        "norm": norm.init(jax.random.key(1), x)["params"],
        "glu": glu.init(jax.random.key(2), x)["params"],
    }

    def run(params):
        return glu.apply({"params": params["glu"]}, norm.apply({"params": params["norm"]}, x))

    def scale(w, inputs):
        if rule == "awq":
            return awq_scale(w, of(inputs), "int3", grid=5)
        return smoothquant_scale(w, of(inputs), alpha=0.7)

    want = run(params)
    normed = norm.apply({"params": params["norm"]}, x)
    both, out = params["glu"]["gate_in"]["kernel"], params["glu"]["out"]["kernel"]
    s = scale(both, normed)
    params["norm"] = divide_outputs(params["norm"], s)
    both = multiply_inputs(both, s)
    gate, value = jnp.split(normed @ params["glu"]["gate_in"]["kernel"], 2, -1)
    t = scale(out, jax.nn.silu(gate) * value)
    params["glu"] = {
        "gate_in": {"kernel": divide_outputs(both, t)},
        "out": {"kernel": multiply_inputs(out, t)},
    }
    assert float(jnp.std(jnp.log(s))) > 0.1
    assert float(jnp.std(jnp.log(t))) > 0.1
    assert_close(run(params), want, "float32", times=2)


def test_smoothquant_makes_ranges_alike():
    w = PAIR[0]
    s = smoothquant_scale(PAIR, of(X), alpha=0.5)
    largest_w = np.abs(np.concatenate(PAIR, 1)).max(1)
    np.testing.assert_allclose(s, np.sqrt(np.abs(X).max(0) / largest_w), rtol=1e-5)
    np.testing.assert_allclose(np.abs(X / np.asarray(s)).max(0), np.asarray(s) * largest_w, rtol=1e-5)
    assert smoothquant_scale(w, of(DEAD))[2] == 1


def test_equalization_makes_ranges_equal_and_keeps_the_function():
    first, second = jnp.asarray(definition.weights(2, 4, K, seed=8)), jnp.stack([PAIR[0], 9 * PAIR[0]])
    bias = jnp.asarray(definition.weights(2, K, seed=9))
    second = second.at[0, 3].set(0.0)
    s = equalization_scale(first, second)
    new = divide_outputs({"kernel": first, "bias": bias}, s)
    after = multiply_inputs(second, s)
    ranges = [np.abs(new["kernel"]).max(1), np.abs(after).max(2)]
    ranges[0][0, 3] = ranges[1][0, 3] = 1
    np.testing.assert_allclose(*ranges, rtol=1e-5)
    x = jnp.asarray(definition.weights(2, 6, 4, seed=7))
    want = jax.nn.relu(x @ first + bias[:, None]) @ second
    assert_close(jax.nn.relu(x @ new["kernel"] + new["bias"][:, None]) @ after, want, "float32")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: awq([], of(X), "int4"), "w: got no matrix"),
        (lambda: awq([PAIR[0], jnp.ones((4, 3))], of(X), "int4"), r"statistics.gram: got .* for w\[1\]"),
        (lambda: awq(PAIR, of(X), "int4", grid=0), "grid: got 0"),
        (lambda: clip_weights(PAIR[0], None, "int4", steps=0), "steps, least: got 0"),
        (lambda: clip_weights(PAIR[0], None, "int4", group_size=0), "group_size: got 0"),
        (lambda: smoothquant_scale(PAIR, of(X), alpha=2.0), "alpha: got 2.0"),
        (lambda: equalization_scale(PAIR[0], PAIR[0]), r"first, second: got \[13, 3\]"),
        (lambda: divide_outputs({"bias": jnp.ones(4)}, jnp.ones(K)), r"params: got \[4\]"),
        (lambda: output_error(PAIR[0], PAIR[1], of(X)), r"q: got \[13, 4\]"),
    ],
)
def test_bad_input(call, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        call()
