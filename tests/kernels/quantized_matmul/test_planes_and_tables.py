"""Products by bit planes and by look-ups: exact for whole numbers, with as many look-ups as bits say."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from frugax.formats import quantize
from frugax.kernels import quantized_matmul
from frugax.kernels.quantized_matmul import lut
from frugax.kernels.quantized_matmul.planes import plane_products
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS

from .definition import dequantized, unpacked

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


LOOKED_UP = [
    ("int2", 64, 32),  # two codes of a byte have one scale, and two another
    ("uint4", 30, 30),  # neither groups nor bytes are whole fours
    ("ternary", 30, None),
    *(("int1", 256, 256), ("int3", 256, 128), ("int4", 512, 128), ("uint3", 70, 35)),
    *(("bipolar4", 128, 64), ("uint8", 24, 8), ("int8", 256, 64), ("bipolar7", 32, 16), ("int5", 20, 4)),
]


@pytest.mark.parametrize(
    ("name", "K", "group"),
    [pytest.param(*c, marks=[] if c in LOOKED_UP[:3] else pytest.mark.full) for c in LOOKED_UP],
)
def test_look_ups_of_whole_numbers_are_exact(name, K, group):
    """For one token and for three, of which a loop takes one after another."""
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (3, K)).astype(np.float32)
    w = quantize(jnp.asarray(rng.standard_normal((K, 5)), jnp.float32), name, group_size=group)
    w = dataclasses.replace(w, scales=jnp.exp2(jnp.arange(w.scales.size).reshape(w.scales.shape) % 3))
    product = jax.jit(partial(quantized_matmul, method="lut"))
    exact = x @ dequantized(w)
    np.testing.assert_array_equal(product(jnp.asarray(x), w), exact)
    np.testing.assert_array_equal(product(jnp.asarray(x[:1]), w), exact[:1])


def test_half_of_a_table_is_all_of_it():
    """Sixteen signed sums of four numbers, from eight entries and a sign."""
    x = np.random.default_rng(0).integers(-127, 128, (3, 4)).astype(np.float32)
    table = lut.signed_sums(jnp.asarray(x))
    assert len(table) == 8
    for bits in itertools.product((False, True), repeat=4):
        same = [jnp.asarray(b == bits[3]) for b in bits[:3]]
        found = lut.look_up(table, same, jnp.asarray(not bits[3]))
        np.testing.assert_array_equal(found, x @ np.where(bits, 1, -1))


def test_look_ups_are_linear_in_bits():
    """A quarter of a look-up for each bit of a weight: seven choices, and one of the sign."""

    def chosen(name):
        w = jax.eval_shape(partial(quantize, format=name), jax.ShapeDtypeStruct((256, 5), jnp.float32))
        program = jax.make_jaxpr(partial(quantized_matmul, method="lut", backend="xla"))(
            jnp.ones((1, 256)), w
        )
        return sum(e.outvars[0].aval.size for e in equations(program.jaxpr) if e.primitive.name == "select_n")

    assert [chosen(f"int{n}") for n in (1, 2, 3, 4)] == [8 * 256 * 5 // 4 * n for n in (1, 2, 3, 4)]


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
    assert_close(y, x @ dequantized(w), "float32")
    assert (np.abs(rounded - y) <= bound).all()
    assert (np.abs(rounded - y) > bound / 100).any(), "the bound says nothing"


def test_planes_of_packed_weights_are_the_dot():
    """The same int32 sums, by bits and by products."""
    arguments = ROW.arguments({"format": "bipolar6", "K": 100, "N": 24, "group": 50, "B": 3})
    x, w = jnp.asarray(arguments["x"]), arguments["w"]
    y, planes = (quantized_matmul(x, w, activations="bipolar6", method=m) for m in ("dot", "planes"))
    np.testing.assert_allclose(planes, y, rtol=1e-6)
    assert unpacked(w).max() == 63
