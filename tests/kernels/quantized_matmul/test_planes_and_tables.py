"""Products by bit planes and by look-ups: exact for whole numbers, with as many look-ups as bits say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from frugax.formats import format_named
from frugax.kernels import quantized_matmul
from frugax.kernels.quantized_matmul import lut
from frugax.kernels.quantized_matmul.planes import plane_products
from tests.kernels.harness import OPERATIONS

from .definition import dequantized, unpacked, values

ROW = OPERATIONS["quantized_matmul"]
BITS = [(n, m) for n in range(1, 9) for m in range(1, 9)]
BY_DEFAULT = [(1, 1), (3, 2), (6, 6), (6, 8), (8, 8)]


@pytest.mark.parametrize(
    "bits", [pytest.param(b, marks=[] if b in BY_DEFAULT else pytest.mark.full) for b in BITS]
)
def test_planes_are_the_product_of_integers(bits):
    """In segments of 40 and a rest of 20, bit for bit; six bits of both are FlexQ's."""
    rng = np.random.default_rng(0)
    n, m = bits
    x, w = rng.integers(0, 2**n, (3, 100)), rng.integers(0, 2**m, (5, 100))
    x[0], w[0] = 2**n - 1, 2**m - 1  # the largest sum
    sums = jax.jit(plane_products, static_argnums=(2, 3, 4))(
        jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), n, m, 40
    )
    xs, ws = (
        np.pad(2 * c - (2**b - 1), ((0, 0), (0, 20))).reshape(len(c), 3, 40) for c, b in ((x, n), (w, m))
    )
    np.testing.assert_array_equal(sums, np.einsum("msk,nsk->smn", xs, ws))


@pytest.mark.parametrize(
    "name",
    [
        "int2",
        "uint4",
        "ternary",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("int1", "int3", "int4", "uint3", "bipolar4")),
    ],
)
def test_look_ups_of_whole_numbers_are_exact(name):
    """Segments of 30, which is no multiple of four: float tables of integers are the integers' sums."""
    format, rng = format_named(name), np.random.default_rng(0)
    x = rng.integers(-127, 128, (3, 30))
    codes = rng.integers(0, 3 if name == "ternary" else 2**format.bits, (5, 30))
    codes = np.where(codes == 2, 3, codes) if name == "ternary" else codes  # two's complement: 3 is -1
    tables = lut.signed_sums(fours(x.astype(np.float32)))
    index = lut.plane_index(fours(codes.astype(np.int32)), format.bits)
    signs, constant = lut.as_signs(format)
    sums = jax.jit(lambda t, i: lut.look_up(t, i, signs, rounded=False))(tables, index)[0]
    exact = x @ values(format.element, codes).T
    np.testing.assert_array_equal(sums + constant * x.sum(1, keepdims=True), exact)
    np.testing.assert_array_equal(sums, full_tables(x, index, signs))


def fours(a: np.ndarray) -> jnp.ndarray:
    """[rows, K] as one segment [1, rows, fours, 4]."""
    return jnp.asarray(np.pad(a, ((0, 0), (0, -a.shape[1] % 4))).reshape(1, a.shape[0], -1, 4))


def full_tables(x: np.ndarray, index: jnp.ndarray, signs: np.ndarray) -> np.ndarray:
    """Sums by tables of all 16 entries, twice as many as are stored."""
    every = 2 * (np.arange(16)[:, None] >> np.arange(4) & 1) - 1
    tables = np.asarray(fours(x))[0] @ every.T  # [M, fours, 16]
    found = np.take_along_axis(tables[:, None], np.asarray(index[0], int)[None], -1)
    return (found.sum(2) * signs[:, None]).sum(1)


def test_look_ups_are_linear_in_bits():
    """A quarter of a look-up for each bit of a weight, in tables of eight."""

    def gathered(name):
        signs, _ = lut.as_signs(format_named(name))
        bits = format_named(name).bits
        shapes = (
            jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32),
            jax.ShapeDtypeStruct((1, bits, 8, 5), jnp.uint8),
        )
        program = jax.make_jaxpr(lambda t, i: lut.look_up(t, i, signs, rounded=False))(*shapes)
        return sum(e.outvars[0].aval.size for e in equations(program.jaxpr) if e.primitive.name == "gather")

    counts = [gathered(f"int{n}") for n in (1, 2, 3, 4)]
    assert counts == [3 * 5 * 32 // 4 * n for n in (1, 2, 3, 4)]


def equations(jaxpr):
    """Yield the equations of a program and of the programs inside."""
    for e in jaxpr.eqns:
        yield e
        for inner in jaxprs_in_params(e.params):
            yield from equations(inner)


def test_tables_of_8_bits_stay_within_their_bound():
    """Each entry is off by half a step: the largest sum of four magnitudes in the group, over 254."""
    arguments = ROW.arguments({"format": "int4", "K": 128, "N": 24, "group": 32, "B": 5})
    x, w = np.asarray(arguments["x"], float), arguments["w"]
    y, rounded = (
        np.asarray(quantized_matmul(jnp.asarray(arguments["x"]), w, method=method), float)
        for method in ("lut", "lut_int8")
    )
    signs, _ = lut.as_signs(w.format)
    steps = np.abs(x).reshape(5, 4, 8, 4).sum(-1).max(-1) / 127  # [tokens, groups]
    bound = steps / 2 * 8 * np.abs(signs).sum() @ np.asarray(w.scales, float)
    np.testing.assert_allclose(y, x @ dequantized(w), atol=1e-3)
    assert (np.abs(rounded - y) <= bound).all()
    assert (np.abs(rounded - y) > bound / 100).any(), "the bound says nothing"


def test_planes_of_packed_weights_are_the_dot():
    """The same int32 sums, by bits and by products."""
    arguments = ROW.arguments({"format": "bipolar6", "K": 100, "N": 24, "group": 50, "B": 3})
    x, w = jnp.asarray(arguments["x"]), arguments["w"]
    y, planes = (quantized_matmul(x, w, activations="bipolar6", method=m) for m in ("dot", "planes"))
    np.testing.assert_allclose(planes, y, rtol=1e-6, atol=1e-5)
    assert unpacked(w).max() == 63
