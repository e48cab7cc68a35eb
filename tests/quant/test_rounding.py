"""Learned rounding against every rounding there is, and biases against means of outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.formats import quantize
from frugax.formats.named import BY_NAME
from frugax.quant import Statistics, bias_correction, gptq, learned_rounding
from tests.quant import definition

K, N = 7, 20
X, W = definition.inputs(40, K), jnp.asarray(definition.weights(K, N))
STATISTICS = Statistics.of(jnp.asarray(X))
FORMATS = [
    f if f in ("int3", "fp4_e2m1") else pytest.param(f, marks=pytest.mark.full)
    for f, format in BY_NAME.items()
    if format.signed and not format.paired
]


def values(format):
    """Every value of each group [K, N, codes], sorted, by decoding all codes in the place of each weight."""
    format, element = BY_NAME[format], BY_NAME[format].element
    q = quantize(W, format)
    decoded = []
    for code in range(element.lowest, element.highest + 1):
        x = format.decode(jnp.full((N, 1, K), code, jnp.int32), q.scaling())
        decoded.append(np.asarray(x)[:, 0].T)
    return np.sort(np.stack(decoded, -1), -1)


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_is_up_or_down_and_near_the_best_there_is(format):
    q = learned_rounding(W, STATISTICS, format, steps=200)
    got, near = (np.asarray(a.dequantize(), np.float64) for a in (q, quantize(W, format)))
    table = values(format)
    below = np.where(table <= np.asarray(W)[..., None], table, -np.inf).max(-1)
    above = np.where(table >= np.asarray(W)[..., None], table, np.inf).min(-1)
    # A scale that is a mean may differ in its last bit: it is one program's sum here, another's there.
    same = [np.isclose(got, x, rtol=2 * np.finfo(np.float32).eps, atol=0) for x in (below, above, near)]
    assert np.any(same, 0).all()
    total = np.zeros(3)
    for n in range(N):
        ends = np.stack([np.where(np.isfinite(e[:, n]), e[:, n], near[:, n]) for e in (below, above)])
        choices = np.array(list(itertools.product((0, 1), repeat=K)))
        every = ends[choices, np.arange(K)]  # [2^K, K]
        errors = ((X @ (every - np.asarray(W)[:, n]).T) ** 2).sum(0)
        mine, plain = (((X @ (a[:, n] - np.asarray(W)[:, n])) ** 2).sum() for a in (got, near))
        assert mine <= plain * (1 + 1e-5)
        total += errors.min(), mine, plain
    best, mine, plain = np.sqrt(total)
    assert mine < 0.9 * plain + 0.1 * best


def test_stacked_matrices_under_jit():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), STATISTICS, Statistics.of(jnp.zeros((1, K))))
    run = jax.jit(lambda w, s: learned_rounding(w, s, "int3", steps=200))
    q = run(jnp.stack([W, W]), stacked).dequantize()
    alone = learned_rounding(W, STATISTICS, "int3", steps=200).dequantize()
    assert definition.error(W, q[0], X) < 1.05 * definition.error(W, alone, X)
    np.testing.assert_array_equal(q[1], quantize(W, "int3").dequantize())  # no input, nothing to learn


@pytest.mark.parametrize("format", ["int3", pytest.param("nvfp4", marks=pytest.mark.full)])
def test_it_goes_on_from_gptq(format):
    """Codes are GPTQ's or their neighbours under GPTQ's scales, and no column loses by it."""
    begun = gptq(W, STATISTICS, format)
    q = learned_rounding(W, STATISTICS, format, start=begun, steps=200)
    jax.tree.map(np.testing.assert_array_equal, q.scaling(), begun.scaling())
    rank = lambda q: np.argsort(np.argsort(values_of_codes(q.format)))[q.unpacked() - q.format.element.lowest]  # noqa: E731
    assert np.abs(rank(q) - rank(begun)).max() == 1
    errors = [((X @ np.asarray(a.dequantize() - W)) ** 2).sum(0) for a in (q, begun)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.98 * errors[1].sum()


@pytest.mark.nan
@pytest.mark.parametrize("format", ["int3", pytest.param("mxfp4", marks=pytest.mark.full)])
def test_statistics_that_are_not_finite_leave_no_codes_of_the_start(format):
    """The matrix whose inputs are known goes on from its start; the other is NaN."""
    begun = jax.jit(jax.vmap(lambda w: quantize(w, format, axis=-2)))(jnp.stack([W, W]))
    unknown = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, STATISTICS)
    both = jax.tree.map(lambda *x: jnp.stack(x), STATISTICS, unknown)
    q = learned_rounding(jnp.stack([W, W]), both, format, start=begun, steps=3).dequantize()
    assert np.isfinite(q[0]).all()
    assert np.isnan(q[1]).all()


def values_of_codes(format):
    element = format.element
    return np.asarray(element.decode(jnp.arange(element.lowest, element.highest + 1)))


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_a_corrected_bias_keeps_the_mean(method):
    x = X + 3.0
    statistics = Statistics.of(jnp.asarray(x))
    q = quantize(W, "int2") if method == "nearest" else gptq(W, statistics, "int2")
    correction = bias_correction(W, q, statistics)
    means = [(x.astype(np.float64) @ np.asarray(a, np.float64)).mean(0) for a in (W, q.dequantize())]
    assert np.abs(means[0] - means[1]).max() > 0.01
    np.testing.assert_allclose(means[1] + correction, means[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: learned_rounding(W, STATISTICS, "int4", steps=0), "steps: got 0"),
        (lambda: learned_rounding(W, STATISTICS, "olive4"), "format: got olive4"),
        (lambda: learned_rounding(W[:-1], STATISTICS, "int4"), "statistics.gram: got"),
        (lambda: learned_rounding(W, STATISTICS, "int4", start=quantize(W, "int3")), "start: got int3"),
        (lambda: bias_correction(W, W[:, :1], STATISTICS), "q: got"),
    ],
)
def test_bad_input(call, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        call()
