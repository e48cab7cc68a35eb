"""GPTQ against Optimal Brain Quantization with explicit inverses, in every format and order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.formats import quantize
from frugax.formats.named import BY_NAME
from frugax.quant import Statistics, gptq, output_error
from tests.quant import definition

K, N = 13, 3  # odd, and of no group's size
X, W = definition.inputs(40, K), jnp.asarray(definition.weights(K, N))
STATISTICS = Statistics.of(jnp.asarray(X))
FORMATS = [
    f if f in ("int4", "nvfp4") else pytest.param(f, marks=pytest.mark.full)
    for f, format in BY_NAME.items()
    if not format.paired
]
GROUPS = [
    ("uint3", 5, {}),
    ("nf4", 5, {"act_order": True}),
    ("mxfp4", 4, {"block": 3}),  # blocks inside of groups
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [
            ("int3", 4, {"block": 8}),  # groups inside of blocks
            ("int3", 6, {"block": 4}),  # two blocks of 3 in a group
            ("int3", 6, {"block": 6}),
            ("int3", 1, {}),
            ("uint4", 13, {"act_order": True, "block": 4}),
            ("bipolar2", 4, {"static_groups": True, "block": 3}),
            ("fp6_e3m2", 5, {"damping": 0.3}),
            ("nf4_dq", 4, {"act_order": True}),
        ]
    ),
]


def stored_alike(a, b):
    """True if two tensors have the same codes, and scales but for the order of a sum."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) if x.dtype == jnp.uint8 else np.allclose(x, y, rtol=1e-6)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def check_obq(q, format, g, w=W, **how):
    want = definition.obq(w, STATISTICS.gram, format, g, **how)
    np.testing.assert_allclose(q.dequantize(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_it_is_obq_and_of_a_diagonal_hessian_rounding_to_the_nearest(format):
    w = W if BY_NAME[format].signed else jnp.abs(W)
    run = functools.partial(gptq, w, format=format)
    q, nearest = run(STATISTICS), quantize(w, format)
    check_obq(q, format, q.group_size, w)
    assert stored_alike(run(Statistics.of(jnp.diag(jnp.arange(K, dtype=jnp.float32)))), nearest)


@pytest.mark.parametrize("format", FORMATS)
def test_outputs_are_nearer_than_those_of_the_nearest_weights(format):
    x, w = definition.inputs(200, 48), jnp.asarray(definition.weights(48, 8))
    w = w if BY_NAME[format].signed else jnp.abs(w)
    q = gptq(w, Statistics.of(jnp.asarray(x)), format, act_order=True)
    nearest = quantize(w, format)
    assert definition.error(w, q.dequantize(), x) < 0.8 * definition.error(w, nearest.dequantize(), x)


@pytest.mark.parametrize(("format", "group_size", "how"), GROUPS)
def test_groups_orders_and_blocks(format, group_size, how):
    q = gptq(W, STATISTICS, format, group_size=group_size, **how)
    how = {name: value for name, value in how.items() if name != "block"}
    check_obq(q, format, group_size, **how)
    of_nearest = quantize(W, format, group_size=group_size)
    assert jax.tree.map(jnp.shape, q) == jax.tree.map(jnp.shape, of_nearest)
    nearest = gptq(W, Statistics.of(jnp.eye(K)), format, group_size=group_size, **how)
    assert stored_alike(nearest, of_nearest)


@pytest.mark.nan
def test_stacked_matrices_dead_channels_and_a_hessian_that_can_not_be_factored():
    alone = gptq(W, STATISTICS, "int4")
    few = Statistics.of(jnp.asarray(X[:4]))  # of rank 4
    none = Statistics.of(jnp.zeros((1, K)))
    empty = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, few)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), STATISTICS, few, none, empty)
    w = jnp.stack([W] * 4)
    q = jax.jit(lambda w, s: gptq(w, s, "int4", damping=0.0))(w, stacked)
    assert q.shape == (4, K, N)
    first = definition.obq(W, STATISTICS.gram, "int4", K, damping=0.0)
    assert definition.error(W, q.dequantize()[0], X) < 1.02 * definition.error(W, first, X)
    # Too few inputs: a solution that fits them, and the weights too.
    few_nearest = definition.error(W, quantize(W, "int4").dequantize(), X[:4])
    assert definition.error(W, q.dequantize()[1], X[:4]) < 0.8 * few_nearest
    assert np.abs(q.dequantize()[1] - W).max() < 2.0
    np.testing.assert_array_equal(q.dequantize()[2], quantize(W, "int4").dequantize())
    np.testing.assert_array_equal(alone.dequantize()[2], quantize(W, "int4").dequantize()[2])  # dead in X
    assert np.isnan(q.dequantize()[3]).all()


def test_output_error_is_that_of_the_outputs():
    q = quantize(W, "int3")
    want = definition.error(W, q.dequantize(), X)
    np.testing.assert_allclose(output_error(W, q, STATISTICS), want, rtol=1e-4)
    np.testing.assert_allclose(output_error(W, q.dequantize(), STATISTICS), want, rtol=1e-4)
    assert output_error(W, W, STATISTICS) == 0


def test_the_program_does_not_grow_with_the_matrix():
    def length(K):
        w, gram = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((K, 8), (K, K)))
        vector, count = jax.ShapeDtypeStruct((K,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        run = functools.partial(gptq, format="uint4", group_size=32)
        return str(jax.make_jaxpr(run)(w, Statistics(gram, *[vector] * 3, count))).count(" = ")

    assert length(256) == length(1024) > 50


@pytest.mark.parametrize(
    ("w", "how", "message"),
    [
        (jnp.ones((K,)), {}, "w: got"),
        (jnp.ones((K, N), jnp.int32), {}, "w: got"),
        (jnp.ones((K + 1, N)), {}, "statistics.gram: got"),
        (jnp.ones((2, K, N)), {}, "statistics.gram: got"),
        (W, {"group_size": 0}, "group_size: got 0"),
        (W, {"format": "ternary", "group_size": 4}, "group_size: got 4; expected None"),
        (W, {"block": 0}, "block: got 0"),
        (W, {"damping": -1.0}, "damping: got -1.0"),
        (W, {"format": "int9"}, "format: got 'int9'"),
        (W, {"format": "olive4"}, "format: got olive4, whose codes go by pairs"),
    ],
)
def test_bad_input(w, how, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        gptq(w, STATISTICS, **{"format": "int4"} | how)
