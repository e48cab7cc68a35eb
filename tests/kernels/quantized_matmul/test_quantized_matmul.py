"""Tests of the portable quantized_matmul alone: its blocks and streams, what it keeps, sums, mixtures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.formats import quantize
from frugax.kernels import MixedActivations, quantized_matmul
from frugax.kernels.quantized_matmul import streamed, xla
from frugax.kernels.quantized_matmul.inputs import check
from frugax.quant import Statistics, outlier_permutation
from tests.errors import assert_close, error
from tests.kernels.harness import OPERATIONS, expected, value_and_gradients

from .calls import ROUNDED
from .definition import dequantized, unpacked, values
from .definition import quantized_matmul as quantized_matmul_in_float64

ROW = OPERATIONS["quantized_matmul"]


def case(format, K, N, group=None, **more):
    return {"format": format, "K": K, "N": N, "group": group, "B": 2} | more


STREAMED = [
    case("int4", 512, 9, 128),
    case("int3", 256, 9, 256),
    case("uint2", 512, 9, 32),
    case("fp8_e4m3", 256, 9, 512),
    case("int4", 1024, 9, 512, B=1),
    case("int1", 512, 9, 64),
    case("int8", 512, 9, 32),
    case("nf4", 256, 9, 64),
    case("nvfp4", 256, 9),
    case("uint8", 256, 9, 128),
    case("int6", 256, 9, 64),
    case("ternary", 256, 9),
]


@pytest.mark.parametrize(
    "given", [*STREAMED[:4], *(pytest.param(c, marks=pytest.mark.full) for c in STREAMED[4:])], ids=str
)
def test_streamed_sums_are_the_product(given, monkeypatch):
    """One or two tokens: groups as large as a block of packed codes, smaller, larger, one."""
    monkeypatch.setattr(streamed, "LEAST", 0)
    arguments = ROW.arguments(given)
    call, spec = check(jnp.asarray(arguments["x"]), arguments["w"], None, None, None)
    assert streamed.serves(call, spec)
    y = jax.jit(streamed.product, static_argnums=1)(call, spec)
    assert_close(y, arguments["x"].astype(float) @ dequantized(arguments["w"]), "float32")


def test_calls_that_are_not_streamed():
    def serves(*given, **more):
        arguments = ROW.arguments(case(*given, **more))
        return streamed.serves(*check(jnp.asarray(arguments["x"]), arguments["w"], None, None, None))

    assert serves("int4", 1024, 256)
    assert not serves("int4", 1024, 256, B=5)
    assert not serves("int4", 1024, 256, 100)  # 256 codes are packed together, and 100 scaled
    assert not serves("int4", 1030, 256)
    assert not serves("int4", 512, 256)


@pytest.mark.parametrize("given", [ROUNDED[1], ROUNDED[2]], ids=str)
def test_rounded_activations_are_the_definition(given):
    """Values; the gradient is that of the product without rounding."""
    arguments = ROW.arguments(given)
    x, w, how = arguments["x"], arguments["w"], arguments["activations"]
    dy = np.random.default_rng(0).standard_normal((*x.shape[:-1], w.shape[1])).astype(np.float32)

    @jax.jit
    def both(x, w, dy):
        y, pullback = jax.vjp(lambda x: quantized_matmul(x, w, activations=how, backend="reference"), x)
        return y, pullback(dy)[0]

    y, dx = both(x, w, dy)
    assert_close(y, quantized_matmul_in_float64(x.astype(float), w, activations=how), "float32")
    assert_close(dx, dy.astype(float) @ dequantized(w).T, "float32")


BLOCKS = [
    case("int4", 1000, 8, 100, bias=True, activations="int8", B=3),  # blocks of 200 rows
    case("uint3", 520, 8, 104, B=3),  # no number of rows is whole bytes and groups: one block
    case("int5", 300, 8, B=3, activations="int8"),
    case("mxfp4", 700, 8, B=3, activations="mxfp8"),
]


@pytest.mark.parametrize("given", BLOCKS, ids=str)
def test_blocks_and_the_rest_are_the_product(given, monkeypatch):
    """Values and gradients, by several blocks of rows and some more."""
    want = expected(ROW, given)
    monkeypatch.setattr(xla, "DECODED", 2048)
    found = value_and_gradients(ROW, ROW.arguments(given), "xla")
    assert_close(found, want, "float32")


@pytest.mark.parametrize("backend", [None, "xla"])
def test_nothing_dequantized_is_kept_for_the_gradient(backend):
    """Saved arrays are packed; temporaries are a few blocks', less than half of W."""
    K, N = 4096, 1024
    w = jax.eval_shape(
        lambda x: quantize(x, "int4", group_size=128), jax.ShapeDtypeStruct((K, N), jnp.float32)
    )
    x = jax.ShapeDtypeStruct((8, K), jnp.float32)

    def pullback(x, w):
        return jax.vjp(lambda x: quantized_matmul(x, w, backend=backend), x)[1]

    saved = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(jax.eval_shape(pullback, x, w)))
    assert saved < 1.1 * w.nbytes + 2 * 4 * 8 * K
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(quantized_matmul(x, w, backend=backend) ** 2)))
    temporary = gradient.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 0.5 * 4 * K * N, temporary


def test_sums_are_those_of_int32():
    """Whole numbers whose sums float32 does not hold; and ternary weights bit for bit."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(100, 128, (2, 5000)), rng.integers(100, 128, (5000, 3))
    int8, ones = frugax.formats.format_named("int8"), frugax.formats.Scaling(np.ones((3, 1), np.float32))
    pack = jax.jit(lambda codes: frugax.formats.from_codes(codes, ones, int8, axis=-2, group_size=5000))
    w = pack(w.T.astype(np.int32))
    x[:, 0] = 127
    product = jax.jit(partial(quantized_matmul, activations="int8", backend="xla"))
    y = product(x.astype(np.float32), w)
    exact = x @ unpacked(w).astype(np.int8)
    assert (exact > 2**24).all()
    np.testing.assert_array_equal(y, exact.astype(np.float32))

    arguments = ROW.arguments(case("ternary", 300, 8, B=3))
    x, w = arguments["x"], arguments["w"]
    y = product(x, w)
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(x / scale).astype(np.int32)
    sums = codes @ values(w.format.element, unpacked(w)).astype(np.int32)
    np.testing.assert_array_equal(y, sums.astype(np.float32) * scale * np.asarray(w.scales))


def test_mixed_blocks_after_a_permutation():
    """Outliers in a few channels of everywhere: one block of int8 in four holds them all."""
    rng = np.random.default_rng(0)
    K, N = 512, 32
    x, W = rng.standard_normal((64, K)).astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)
    x[:, rng.permutation(K)[:20]] *= 30
    order, _ = outlier_permutation(Statistics.of(jnp.asarray(x)))
    assert sorted(order.tolist()) == list(range(K))
    assert_close(x[:, order] @ W[order], x @ W, "float32")

    @jax.jit
    def products(x, W):
        w = quantize(W, "int4", group_size=128)
        how = (None, "int4", MixedActivations(0), MixedActivations(1), "int8")
        return [quantized_matmul(x, w, activations=activations) for activations in how]

    exact, token, uniform, mixed, best = products(x[:, order], W[order])
    assert error(uniform, exact) < error(token, exact)
    assert error(mixed, exact) < 0.3 * error(uniform, exact)
    # What has few bits are the small channels: their own error is that of int4 without outliers.
    exact, _, _, mixed, best = products(x[:, order], W[order] * (np.arange(K) >= 128)[:, None])
    assert error(mixed, exact) < 0.15 < error(best, exact) + 0.1


def test_stacked_weights_map():
    """vmap over experts, each with its own codes, scales and zeros."""
    rng = np.random.default_rng(0)
    W, x = (rng.standard_normal(s).astype(np.float32) for s in ((3, 64, 8), (3, 5, 64)))
    w = jax.jit(jax.vmap(lambda W: quantize(W, "uint4", group_size=32)))(W)
    run = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(quantized_matmul(x, w))))
    y, gradient = map(np.asarray, jax.jit(jax.vmap(run))(x, w))
    for i in range(3):
        want = jax.jit(run)(x[i], jax.tree.map(lambda a, i=i: np.asarray(a)[i], w))
        assert_close((y[i], gradient[i]), want, "float32", times=2)


@pytest.mark.nan
def test_zero_and_nan_groups():
    """A group of zeros adds nothing; one of NaN spoils its own columns alone."""
    W = np.ones((64, 4), np.float32)
    W[:32], W[40, 2] = 0, np.nan
    product = jax.jit(lambda x, W: quantized_matmul(x, quantize(W, "int8", group_size=32), backend="xla"))
    y = np.asarray(product(np.ones((2, 64), np.float32), W))
    np.testing.assert_allclose(y[:, [0, 1, 3]], 32, rtol=1e-6)
    assert np.isnan(y[:, 2]).all()
