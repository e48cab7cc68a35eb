"""Minifloats, bipolar integers and codebooks, code for code against definitions of their own."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from frugax.formats import Bipolar, Codebook, Minifloat
from frugax.formats.codebook import NF4
from frugax.formats.named import BY_NAME

IN_ML_DTYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


def values_of(f: Minifloat) -> np.ndarray:
    """The value of each code, bit field by bit field."""
    values = []
    for code in range(2**f.bits):
        sign = -1.0 if f.signed and code >> (f.bits - 1) else 1.0
        e, m = (code >> f.mantissa) % 2**f.exponent, code % 2**f.mantissa
        fraction = m / 2**f.mantissa
        values.append(
            sign * (fraction * 2.0 ** (1 - f.bias) if e == 0 else (1 + fraction) * 2.0 ** (e - f.bias))
        )
    return np.array(values)


def nearest_even(x: np.ndarray, f: Minifloat) -> np.ndarray:
    """The codes by exhaustive search: the nearest magnitude, of two as near the even code."""
    top = 2 ** (f.exponent + f.mantissa) - f.reserved
    magnitudes = values_of(f)[:top]
    x64 = x.astype(np.float64)
    a = np.minimum(np.abs(x64) if f.signed else np.maximum(x64, 0), magnitudes[-1])
    distance = np.abs(a[:, None] - magnitudes)
    tied = distance == distance.min(1, keepdims=True)
    even = np.where(tied, np.arange(top) % 2 * 1000 + np.arange(top), 10**6).argmin(1)
    return even + np.where((x64 < 0) & f.signed, 2 ** (f.bits - 1), 0)


def numbers(f: Minifloat) -> np.ndarray:
    """Every value, every middle and its float32 neighbours, numbers outside, tiny ones and both zeros.

    As many for every format, some of them twice, so that they share what is compiled.
    """
    top = 2 ** (f.exponent + f.mantissa) - f.reserved
    values = values_of(f)[:top]
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))]
    many = np.random.default_rng(0).standard_normal(500) * values[-1]
    x = np.concatenate([values, middles, *beside, many, [values[-1] * 3, 1e30, 1e-30, 0.0]]).astype(
        np.float32
    )
    return np.resize(np.concatenate([x, -x]), 3200)


ODD = [Minifloat.of(1, 1), Minifloat.of(3, 0), Minifloat.of(2, 5, bias=4), Minifloat.of(5, 3, signed=False)]
NAMED = [BY_NAME[name].element for name in IN_ML_DTYPES]


@pytest.mark.nan
@pytest.mark.parametrize("f", NAMED + ODD, ids=lambda f: f.name)
def test_minifloats_are_their_definition(f):
    top = 2 ** (f.exponent + f.mantissa) - f.reserved
    codes = np.arange(256) % 2**f.bits
    number = codes % 2 ** (f.exponent + f.mantissa) < top
    got = np.asarray(f.decode(jnp.asarray(codes)))
    np.testing.assert_array_equal(got[number], values_of(f)[codes[number]])
    assert f.largest == values_of(f)[top - 1]
    x = numbers(f)
    np.testing.assert_array_equal(f.encode(jnp.asarray(x)), nearest_even(x, f))
    again = np.asarray(f.encode(jnp.asarray(got)))
    zero = codes == 2 ** (f.exponent + f.mantissa)  # minus zero comes back as zero
    np.testing.assert_array_equal(again[number], np.where(zero & f.signed, 0, codes)[number])


@pytest.mark.nan
@pytest.mark.parametrize("name", IN_ML_DTYPES)
def test_minifloats_are_ml_dtypes(name):
    """Every code's value, NaN and infinity included; and rounding, within the range."""
    f, theirs = BY_NAME[name].element, IN_ML_DTYPES[name]
    codes = (np.arange(256) % 2**f.bits).astype(np.uint8)
    np.testing.assert_array_equal(
        f.decode(jnp.asarray(codes.astype(np.int32))), codes.view(theirs).astype(np.float32)
    )
    x = numbers(f)
    x = np.where(np.abs(x) <= f.largest, x, 0)
    np.testing.assert_array_equal(f.decode(f.encode(jnp.asarray(x))), x.astype(theirs).astype(np.float32))


@pytest.mark.parametrize("f", [NAMED[0], NAMED[3], ODD[3]], ids=lambda f: f.name)
def test_stochastic_minifloats_are_unbiased(f):
    """Draws are the two neighbours of x, and their mean is x within five standard errors."""
    n, top = 4000, 2 ** (f.exponent + f.mantissa) - f.reserved
    values = np.unique(values_of(f)[:top])
    values = np.unique(np.concatenate([-values, values])) if f.signed else values
    rng = np.random.default_rng(1)
    x = (rng.uniform(values[0], values[-1], 64) * 10 ** rng.uniform(-3, 0, 64)).astype(np.float32)
    uniform = rng.uniform(0, 1, (n, 64)).astype(np.float32)
    drawn = np.asarray(f.decode(f.encode_stochastic(jnp.tile(x, (n, 1)), jnp.asarray(uniform))), np.float64)
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    gap = values[above] - values[above - 1]
    assert (np.abs(drawn - x) <= gap * (1 + 1e-6)).all()
    assert (drawn.std(0) > 0).mean() > 0.9
    assert (np.abs(drawn.mean(0) - x) < 5 * gap / 2 / np.sqrt(n)).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_plane_of_bipolar_integers_is_a_sign(bits):
    f, codes = Bipolar("bipolar", bits, True), np.arange(256) % 2**bits
    planes = 2 * ((codes[:, None] >> np.arange(bits)) & 1) - 1
    np.testing.assert_array_equal(f.decode(jnp.asarray(codes)), planes @ 2 ** np.arange(bits))
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 999).astype(np.float32) * f.largest
    values = np.arange(-f.largest, f.largest + 1, 2)
    np.testing.assert_array_equal(f.encode(jnp.asarray(x)), np.abs(x[:, None] - values).argmin(1))


def test_nf4_is_the_quantiles_of_the_normal_distribution():
    """As the paper defines it (arXiv 2305.14314, section 3 and its code's offset)."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0]]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=2e-7)


def test_codebooks():
    """The nearest value, a middle rounding down; larger tables as small ones."""
    rng = np.random.default_rng(0)
    for n in (2, 5, 16, 17, 200):
        values = np.sort(rng.standard_normal(n)).astype(np.float32)
        book = Codebook.of("mine", values)
        assert book.bits == int(np.ceil(np.log2(n)))
        codes = np.arange(256) % n
        np.testing.assert_array_equal(book.decode(jnp.asarray(codes)), values[codes])
        x = rng.standard_normal(500).astype(np.float32) * 1.5
        nearest = np.abs(x[:, None].astype(np.float64) - values).argmin(1)
        np.testing.assert_array_equal(book.encode(jnp.asarray(x)), nearest)
    assert Codebook.of("mine", [0, 1]).encode(jnp.array([0.5])).item() == 0


def test_bad_elements():
    for bits in ((0, 3), (5, 3), (3, -1)):
        with pytest.raises(ValueError, match=f"exponent, mantissa: got {bits[0]}, {bits[1]}"):
            Minifloat.of(*bits)
    with pytest.raises(ValueError, match="bias: got 1000"):
        Minifloat.of(2, 1, bias=1000)
    for values in ([1.0], [1, 0], [0, 0, 1]):
        with pytest.raises(ValueError, match="values: got"):
            Codebook.of("mine", values)
