"""Scale schemes against NumPy, on groups that are ordinary, zero, huge, tiny, one-sided and not numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from frugax import formats
from frugax.formats import format_named, quantize
from frugax.formats.named import BY_NAME
from tests.formats.test_elements import values_of

WEIGHTS = [name for name, f in BY_NAME.items() if not ("dynamic" in name or name in ("mulaw8", "ufp8_e4m4"))]
SMALL = ["int3", "uint4", "bipolar2", "ternary", "fp8_e4m3", "nf4_dq", "mxfp6", "nvfp4", "bitmod3", "olive4"]


def groups() -> np.ndarray:
    """[24, 2 columns, 32]."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((24, 2, 32)).astype(np.float32)
    x[:4] *= 10.0 ** rng.integers(-8, 8, (4, 1, 1))
    x[4] = 0
    x[5] = np.abs(x[5])
    x[6] = -np.abs(x[6]) - 1
    x[7, :, 0] = 64.0
    return x


def stored(name: str, x: np.ndarray):
    """(codes, scaling) of the groups of a format, as NumPy arrays."""
    format = format_named(name)
    scaling = jax.jit(format.fit)(jnp.asarray(x))
    return np.asarray(jax.jit(format.encode)(jnp.asarray(x), scaling)), scaling


def test_asymmetric_has_a_code_of_zero():
    x = groups()
    codes, scaling = stored("uint4", x)
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    scale = (high - low) * np.float32(1 / 15)
    zero = np.floor(-low / np.where(scale == 0, 1, scale) + np.float32(0.5))
    np.testing.assert_array_equal(scaling.scales, scale)
    np.testing.assert_array_equal(scaling.zeros, zero)
    unit = x / np.where(scale == 0, 1, scale)[..., None] + zero[..., None]
    np.testing.assert_array_equal(codes, np.floor(np.clip(unit, 0, 15) + np.float32(0.5)))
    back = np.asarray(format_named("uint4").decode(jnp.asarray(codes), scaling))
    assert (back[x == 0] == 0).all()
    assert (np.abs(back - x) <= scale[..., None] * 0.51).all()


@pytest.mark.nan
@pytest.mark.parametrize("rounding", ["floor", "nearest", "up"])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxint8"])
def test_powers_of_two(name, rounding):
    """`floor` is the specification's; `nearest` rounds the largest to the element's digits before."""
    element = format_named(name).element
    format = dataclasses.replace(format_named(name), scheme=formats.PowerOfTwo(rounding))
    x = groups()
    x[8:16, :, 0] = np.linspace(1, 2, 8, endpoint=False)[:, None] * 8 * np.array([1, 1.0624])
    x[16, 0, 3], x[17, 1, 2] = np.nan, np.inf
    scaling = format.fit(jnp.asarray(x))
    largest = np.abs(x).max(-1).astype(np.float64)
    top = np.floor(np.log2(element.largest))
    with np.errstate(all="ignore"):
        exponent = np.floor(np.log2(largest))
        unit = largest / 2.0 ** (exponent - top)  # in [2^top, 2^(top + 1))
        if rounding == "nearest":
            exponent += unit >= (element.largest + 2.0 ** (top + 1)) / 2
        if rounding == "up":
            exponent += unit > element.largest
    want = np.where(np.isfinite(largest), np.clip(exponent - top + 127, 1, 254), 255)
    np.testing.assert_array_equal(scaling.scales, want)
    scale = np.asarray(format.scale(scaling))
    finite = np.isfinite(largest)
    np.testing.assert_array_equal(scale[finite], 2.0 ** (want[finite] - 127))
    assert np.isnan(scale[~finite]).all()
    if rounding == "up":
        assert (largest[finite] <= element.largest * scale[finite]).all()


def test_nvfp4_is_its_definition():
    """Scales are e4m3 under one float32 a matrix; codes are ml_dtypes' rounding of x over the scale."""
    x = groups()[8:, 0].reshape(16, 2, 16)
    codes, scaling = stored("nvfp4", x)
    wanted = np.abs(x).max(-1) * np.float32(1 / 6)
    outer = wanted.max() * np.float32(1 / 448)
    eighth = (wanted / outer).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(scaling.scales.codes, eighth.view(np.uint8))
    assert scaling.scales.outer.item() == outer
    scale = eighth.astype(np.float32) * outer
    np.testing.assert_array_equal(codes, np_codes(x / scale[..., None]))


@pytest.mark.nan
@pytest.mark.parametrize("rounding", ["nearest", "up"])
def test_rounded_scales_are_their_definition(rounding):
    """Scales are e4m3, saturated; NaN for a group with what isn't finite, as in every format."""
    x = groups()[:, 0]
    x[8, 3], x[9, 2], x[10, 1] = np.nan, np.inf, -np.inf
    element = format_named("fp8_e4m3").element
    scheme = formats.RoundedAbsMax(element, rounding)
    format = dataclasses.replace(format_named("fp4_e2m1"), scheme=scheme)
    scaling = format.fit(jnp.asarray(x))
    wanted = np.abs(x).max(-1) * np.float32(1 / 6)
    finite, below = np.isfinite(wanted), np.minimum(wanted, 448)
    want = below.astype(ml_dtypes.float8_e4m3fn)
    if rounding == "up":
        above = (want.view(np.uint8) + 1).view(want.dtype)
        want = np.where(want.astype(np.float32) < below, above, want)
    scale = np.asarray(format.scale(scaling))
    np.testing.assert_array_equal(scale[finite], want.astype(np.float32)[finite])
    back = np.asarray(format.decode(format.encode(jnp.asarray(x), scaling), scaling))
    assert np.isnan(back[~finite]).all()
    assert np.isfinite(back[finite]).all()
    with pytest.raises(ValueError, match=r"element: got .*; expected a Minifloat with a NaN"):
        formats.RoundedAbsMax(format_named("fp4_e2m1").element)


def np_codes(unit):
    """fp4_e2m1 codes by ml_dtypes, saturating; its minus zero is kept."""
    return np.clip(unit, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15


def test_double_quantization_is_its_definition():
    """Scales less their mean, in the dynamic map, in blocks of 256 columns: about 4.127 bits a weight."""
    w = np.random.default_rng(0).standard_normal((512, 600)).astype(np.float32)
    q, *back = jax.jit(double_quantized)(w)
    wanted = np.abs(w).reshape(8, 64, 600).max(1)
    rest = wanted - wanted.mean(dtype=np.float32)
    outer = np.stack([np.abs(rest[:, i : i + 256]).max(1) for i in (0, 256, 512)], 1)
    np.testing.assert_allclose(q.scales.outer, outer, rtol=1e-5)
    unit = rest / np.repeat(outer, 256, axis=1)[:, :600]
    values = np.asarray(BY_NAME["dynamic8"].element.decode(jnp.arange(256)))
    off = np.abs(values[np.asarray(q.scales.codes)] - unit)
    np.testing.assert_allclose(off, np.abs(unit[..., None] - values).min(-1), atol=1e-6)
    bits = q.nbytes * 8 / w.size
    assert abs(bits - 4 - 8 / 64 - 8 * 3 * 32 / w.size - 32 / w.size) < 1e-9
    errors = [((np.asarray(values) - w) ** 2).mean() for values in back]
    assert abs(errors[1] / errors[0] - 1) < 0.01


def double_quantized(w):
    """(the tensor, its values, those of nf4 alone)."""
    q = quantize(w, "nf4_dq")
    return q, q.dequantize(), quantize(w, "nf4").dequantize()


def test_the_least_squares_scale_is_the_best_of_its_grid():
    x = groups()[8:]
    format = dataclasses.replace(format_named("int3"), scheme=formats.LeastSquares(steps=16, least=0.4))
    scale = np.asarray(format.scale(format.fit(jnp.asarray(x))))
    tried = np.abs(x).max(-1)[..., None] / 3 * (1 - 0.6 * np.arange(16) / 15)
    error = [
        ((np.clip(np.round(x / s), -3, 3) * s - x) ** 2).sum(-1) for s in np.moveaxis(tried[..., None], 2, 0)
    ]
    best = np.take_along_axis(tried, np.argmin(error, 0)[..., None], -1)[..., 0]
    assert np.mean(np.abs(scale / best - 1) < 1e-5) > 0.95  # but for ties
    assert (scale < np.abs(x).max(-1) / 3 * 0.99).mean() > 0.5
    far = format.scale(format.fit(jnp.asarray(x * np.float32(2.0**90))))  # no float32 holds squares of these
    np.testing.assert_array_equal(far, scale * np.float32(2.0**90))


def test_published_errors():
    """Relative rms error on N(0, 1), within 2 % of qwix's; of signs, 1 - 2 / pi is the squared error."""
    published = {("nf4", 64): 0.0920, ("int4", 64): 0.1027, ("mxfp4", 32): 0.1119, ("nvfp4", 16): 0.0950}
    published["int1", 256] = (1 - 2 / np.pi) ** 0.5
    x = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
    for how, error in errors(x, tuple(published)).items():
        assert abs(error / published[how] - 1) < 0.02, how


def test_bipolar_gains_where_there_are_no_zeros_and_loses_where_there_are():
    x = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    sparse = np.where(np.random.default_rng(1).random(x.shape) < 0.8, 0, x)
    both = ("bipolar3", 64), ("int3", 64)
    (bipolar, integer), (of_sparse, integer_of_sparse) = (errors(part, both).values() for part in (x, sparse))
    assert bipolar < integer
    assert of_sparse > 1.5 * integer_of_sparse


def errors(x: np.ndarray, how: tuple) -> dict:
    """The relative rms error in each (format, group size)."""
    return dict(zip(how, map(float, _errors(x, how)), strict=True))


@functools.partial(jax.jit, static_argnums=1)
def _errors(x, how):
    back = [quantize(x, name, group_size=group).dequantize() for name, group in how]
    return [jnp.sqrt(jnp.mean((y - x) ** 2) / jnp.mean(x**2)) for y in back]


def draw() -> np.ndarray:
    """[2, 70, 9], with a NaN and an infinity in the second matrix and a column of zeros in the first."""
    w = np.random.default_rng(0).standard_normal((2, 70, 9)).astype(np.float32)
    w[1, 3, 4], w[1, 40, 2] = np.nan, -np.inf
    w[0, :, 5] = 0
    return w


@pytest.mark.nan
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SMALL else pytest.mark.full) for n in WEIGHTS]
)
def test_every_format(name):
    """Odd sizes, stacks, NaN, infinities, zeros: whole under jit and vmap, stored as it is, densely."""
    format, w = format_named(name), draw()
    group = None if name == "ternary" else 32

    @jax.jit
    def run(w):
        stack = quantize(w, format, axis=-2, group_size=group)
        one = jax.tree.map(lambda x: x[0], stack)
        mapped = jax.vmap(lambda w: quantize(w, format, group_size=group))(w)
        return stack, mapped, stack.dequantize(), one, one.dequantize()

    stack, mapped, back, one, first = run(w)
    back = np.asarray(back)
    assert stack.shape == w.shape
    assert back.shape == w.shape
    np.testing.assert_array_equal(first, back[0])
    assert jax.tree.structure(mapped) == jax.tree.structure(stack)
    jax.tree.map(np.testing.assert_array_equal, mapped, stack)
    # a group without a number is none; another stays what it was
    assert np.isnan(np.stack([back[1, :32, 4], back[1, 32:64, 2]]) if group else back[1]).all()
    assert np.isfinite(back[0]).all()
    if "bipolar" not in name and name != "int1":
        assert (back[0, :, 5] == 0).all()
    unit = 8 // np.gcd(format.bits, 8)
    assert stack.codes.size == 2 * 9 * (70 + -70 % unit) * format.bits // 8
    # what is stored is what comes back from a file, and a file of another format says so
    blob = serialization.to_bytes(one)
    again = serialization.from_bytes(jax.tree.map(np.zeros_like, one), blob)
    jax.tree.map(np.testing.assert_array_equal, again, one)
    other = dataclasses.replace(one, format=dataclasses.replace(format, name="other"))
    with pytest.raises(ValueError, match=f"format: got {name} in the file; expected other"):
        serialization.from_bytes(other, blob)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "mxfp8" else pytest.mark.full) for n in WEIGHTS]
)
def test_jit_changes_nothing(name):
    """A tensor has the same codes, scales and values where each operation is a program of its own."""
    w, group = draw()[0], None if name == "ternary" else 32
    quantize_ = lambda w: quantize(w, name, group_size=group)  # noqa: E731
    one, back = jax.jit(lambda w: ((q := quantize_(w)), q.dequantize()))(w)
    eager = quantize_(jnp.asarray(w))
    jax.tree.map(np.testing.assert_array_equal, eager, one)
    np.testing.assert_array_equal(eager.dequantize(), back)


def test_values_are_the_elements():
    """A dequantized tensor holds scale times values of the element, and no others."""
    names = ("fp4_e2m1", "mxfp6_e3m2")
    stored = jax.jit(lambda x: [quantize(x, name, axis=-1, group_size=32) for name in names])
    stored = stored(groups()[8:].reshape(-1, 32))
    back = jax.jit(lambda stored: [(q.dequantize(), q.format.scale(q.scaling())) for q in stored])(stored)
    for q, (values, scale) in zip(stored, back, strict=True):
        unit = np.asarray(values) / np.asarray(scale)
        assert (
            np.abs(unit[..., None] - values_of(q.format.element)).min(-1).max()
            < 1e-6 * q.format.element.largest
        )


def test_stochastic_rounding_of_tensors_is_unbiased():
    """Means of draws, also of the largest of each group, which nearest rounding cuts."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 2)), jnp.float32)
    for name in ("int4", "mxfp4", "uint3", "nvfp4", "bitmod3"):
        draw = lambda key, name=name: quantize(  # noqa: E731
            x, name, group_size=32, rounding="stochastic", key=key
        ).dequantize()
        drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000)), np.float64)
        error = np.abs(drawn.mean(0) - x)
        assert (error < 6 * (drawn.std(0) + 1e-6) / np.sqrt(4000) + 1e-6 * np.abs(x)).all(), name


def test_straight_through():
    x = np.linspace(-1, 1, 64, dtype=np.float32)
    loss = lambda x: jnp.sum(formats.fake_quantize(x, "int3", group_size=16) ** 2)  # noqa: E731
    rounded = lambda x: quantize(x, "int3", group_size=16).dequantize()  # noqa: E731
    gradient, values = jax.jit(lambda x: (jax.grad(loss)(x), rounded(x)))(x)
    np.testing.assert_allclose(gradient, 2 * values, rtol=1e-6)
    assert np.abs(values - x).max() > 0.05


def test_inside_params_under_scan_and_grad():
    """Codes are frozen, scales have a gradient, and layers stacked over depth are scanned."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 16, 16)).astype(np.float32) / 4
    q = jax.jit(lambda w: quantize(w, "int4", axis=-2, group_size=8))(w)

    def loss(scales, x):
        layers = dataclasses.replace(q, scales=scales)
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.dequantize()), None), x, layers)[0] ** 2)

    x, scales = np.ones((2, 16), np.float32), np.asarray(q.scales)
    loss_and_grad = jax.jit(jax.value_and_grad(loss))
    step = 1e-3 * rng.standard_normal(scales.shape).astype(np.float32)
    slope = (loss_and_grad(scales + step, x)[0] - loss_and_grad(scales - step, x)[0]) / 2
    np.testing.assert_allclose(np.vdot(loss_and_grad(scales, x)[1], step), slope, rtol=1e-2)


@pytest.mark.parametrize("name", BY_NAME)
def test_formats_promote_no_rank_and_no_dtype(name):
    """As traced with JAX's strict settings, which users turn on to find their own mistakes."""

    def there_and_back(x):
        return quantize(x, name, axis=-2, group_size=None if name == "ternary" else 16).dequantize()

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        shape = jax.eval_shape(there_and_back, jax.ShapeDtypeStruct((2, 64, 8), jnp.float32)).shape
    assert shape == (2, 64, 8)
