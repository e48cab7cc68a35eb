"""Codes against tables written from their definitions, rounding, packing, and tensors that hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.formats import Integer
from frugax.formats.lookup import lookup
from frugax.formats.packing import codes_per_unit, pack, unpack

INTEGERS = [f"int{n}" for n in range(2, 9)]
EVERY = [*INTEGERS, "dynamic8", "udynamic8", "udynamic8_positive", "mulaw8", "ufp8_e4m4"]
NUMBERS = 5000
EPS = float(np.finfo(np.float32).eps)


def table(name: str) -> np.ndarray:
    """Every value of a format in float64, smallest first, as its definition says."""
    if name.startswith("int"):
        h = 2 ** (int(name[3:]) - 1) - 1
        return np.arange(-h, h + 1.0)
    if name == "mulaw8":  # G.711: segments of 16 even steps, each twice as wide as the one before
        edges = np.cumsum(np.repeat(2.0 ** np.arange(8), 16))[:127]
        return np.concatenate([-edges[::-1], [0], edges]) / edges[-1]
    if name == "ufp8_e4m4":
        return np.sort([(1 + m / 16) * 2.0**e for e in range(-16, 0) for m in range(16)] + [1])[1:]
    signed = name == "dynamic8"
    positive = []
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        positive.extend(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
    positive = np.array(positive)
    if name == "udynamic8_positive":
        return np.sort([positive[0] / 2, *positive, 1])
    return np.sort(np.concatenate([-positive if signed else [], [0], positive, [1]]))


def numbers(name: str) -> np.ndarray:
    """Numbers over seven decades, and both sides of every place where rounding changes its mind.

    As many for every format, some of them twice, so that they share what is compiled.
    """
    values = table(name)
    middles = (values[1:] + values[:-1]) / 2
    spread = 10 ** np.random.default_rng(0).uniform(-7, 0, 4000) * np.tile([1, -1], 2000)
    spread = spread if values[0] < 0 else np.abs(spread)
    spread = spread * values[-1]
    rounded = np.abs(middles) + (2**-8 if name == "mulaw8" else 0)  # an offset is added, which costs digits
    edges = middles[:, None] + rounded[:, None] * [-8 * EPS, 8 * EPS]
    return np.resize(np.concatenate([values, edges.ravel(), spread]).astype(np.float32), NUMBERS)


def test_dynamic_maps_have_256_values():
    for name in ("dynamic8", "udynamic8"):
        values = table(name)
        assert len(np.unique(values)) == 256
        assert values[-1] == 1
        assert 0 in values


@pytest.mark.parametrize("name", EVERY)
def test_codes_are_the_table(name):
    format, values = frugax.formats.format_named(name).element, table(name)
    assert format.highest - format.lowest == len(values) - 1
    codes, values = (np.resize(x, 256) for x in (np.arange(format.lowest, format.highest + 1), values))
    np.testing.assert_allclose(format.decode(jnp.asarray(codes, jnp.int32)), values, rtol=4 * EPS, atol=0)
    np.testing.assert_array_equal(format.encode(jnp.asarray(values, jnp.float32)), codes)


@pytest.mark.parametrize("name", EVERY)
def test_the_nearest_code_is_chosen(name):
    format, values, x = frugax.formats.format_named(name).element, table(name), numbers(name)
    nearest = np.abs(x.astype(np.float64)[:, None] - values).argmin(1) + format.lowest
    np.testing.assert_array_equal(format.encode(jnp.asarray(x)), nearest)


@pytest.mark.parametrize("name", EVERY[len(INTEGERS) :])
def test_tables_are_the_arithmetic(name):
    """Tables do as arithmetic does, on both sides of every middle and for zeros and tiny numbers."""
    format, values = frugax.formats.format_named(name).element, table(name)
    tables = jax.tree.map(jnp.asarray, lookup(format))
    tiny = np.float32([0, -0.0, 1e-9, 1e-30, 1e-45] if values[0] >= 0 else [0, -0.0, 1e-9, -1e-9, -1e-45])
    x = np.concatenate([numbers(name), tiny])
    nearest = np.abs(x.astype(np.float64)[:, None] - values).argmin(1) + format.lowest
    codes = jnp.asarray(np.resize(np.arange(format.lowest, format.highest + 1), 256), jnp.int32)
    encoded, decoded = by_tables(tables, x, codes)
    np.testing.assert_array_equal(encoded, nearest)
    np.testing.assert_array_equal(decoded, format.decode(codes))


@jax.jit
def by_tables(tables, x, codes):
    return tables.encode(x), tables.decode(codes)


@pytest.mark.parametrize("name", ["dynamic8", "udynamic8"])
def test_dynamic_maps_are_bitsandbytes(name):
    """Against the authors' package (MIT), which the `parity` extra brings."""
    functional = pytest.importorskip("bitsandbytes.functional")
    format = frugax.formats.format_named(name).element
    theirs = functional.create_dynamic_map(signed=format.signed).numpy()
    np.testing.assert_allclose(format.decode(jnp.arange(256)), theirs, rtol=4 * EPS, atol=0)


def test_values_too_close_for_tables():
    """A format with two middles in one bucket says so, where its codes would be wrong."""
    with pytest.raises(ValueError, match="element: got dense, whose values lie too close"):
        lookup(_Dense("dense", 8, signed=False))


class _Dense(Integer):
    def decode(self, codes):
        return 0.5 + codes.astype(jnp.float32) * (0.5 / 2**12)


def test_relative_error_over_seven_decades():
    """The purpose of the dynamic map: small numbers beside large ones keep their digits, as int8's do not."""
    x = 10.0 ** np.random.default_rng(1).uniform(-6, 0, NUMBERS)
    error = {}
    for name in ("dynamic8", "udynamic8", "int8"):
        element = frugax.formats.format_named(name).element
        unit = jnp.asarray(x * element.largest, jnp.float32)
        error[name] = np.abs(np.asarray(element.decode(element.encode(unit))) / element.largest / x - 1)
    decade = np.ceil(np.log10(x)) + 6  # 0 .. 6: a value of decade i lies within half a cell of 0.9 / 2^i
    for name, cells in (("dynamic8", 1), ("udynamic8", 2)):
        half = 0.45 / (cells * 2**decade) * 10.0 ** np.ceil(np.log10(x)) / x
        assert (error[name] <= half * (1 + 1e-5) + 1e-6).all()
    assert (error["int8"] > 0.99).mean() > 0.5


def test_sixteen_codes_an_octave():
    """A number is known to 1/32 of itself; where there is an offset, of the sum."""
    x = 10.0 ** np.random.default_rng(1).uniform(-6, 0, NUMBERS)
    for name, offset, least in (("mulaw8", 1 / 247, 0.0), ("ufp8_e4m4", 0.0, 17 / 2**20)):
        format = frugax.formats.format_named(name).element
        known = np.asarray(format.decode(format.encode(jnp.asarray(x, jnp.float32))), np.float64)
        off = np.abs(known - x)[x > least] / (x + offset)[x > least]
        assert off.max() <= 1 / 32 + 1e-6
        assert off.max() > 1 / 40


@pytest.mark.parametrize("name", ["int4", "int8", "dynamic8", "udynamic8", "mulaw8"])
def test_stochastic_rounding_is_unbiased(name):
    """The mean of n draws lies within five standard errors, and a draw is one of the two neighbours."""
    format, values, n = frugax.formats.format_named(name).element, table(name), 4000
    rng = np.random.default_rng(2)
    x = values[-1] * 10 ** rng.uniform(-5, 0, 64) * (rng.choice([-1, 1], 64) if values[0] < 0 else 1)
    x = np.clip(x, values[0], values[-1]).astype(np.float32)
    codes = format.encode_stochastic(jnp.tile(x, (n, 1)), jax.random.uniform(jax.random.key(0), (n, 64)))
    drawn = np.asarray(format.decode(codes), np.float64)
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    gap = values[above] - values[above - 1]
    assert (np.abs(drawn - x) <= gap * (1 + 1e-5)).all()
    assert (drawn.std(0) > 0).mean() > 0.9
    assert (np.abs(drawn.mean(0) - x) < 5 * gap / 2 / np.sqrt(n)).all()


@pytest.mark.parametrize("signed", [False, True])
def test_packing_is_dense_and_loses_nothing(signed):
    rng, codes = np.random.default_rng(0), {}
    for bits in range(1, 9):
        low = -(2 ** (bits - 1)) if signed else 0
        codes[bits] = rng.integers(low, low + 2**bits, (3, 5 * codes_per_unit(bits)))

    @jax.jit
    def there_and_back(codes):
        packed = {bits: pack(x, bits) for bits, x in codes.items()}
        return packed, {bits: unpack(x, bits, signed=signed) for bits, x in packed.items()}

    packed, back = there_and_back(codes)
    for bits, x in codes.items():
        assert packed[bits].dtype == jnp.uint8
        assert packed[bits].size * 8 == x.size * bits
        np.testing.assert_array_equal(back[bits], x)


def test_tensors():
    """Groups are quantized apart, over any axis and with a ragged tail; a group of zeros stays zeros."""
    cases = [((7,), 0, 4), ((33, 5), 0, 16), ((2, 3, 70), -1, None)]
    cases = {
        f"{name} {shape}": (name, shape, axis, group) for shape, axis, group in cases for name in TENSORS
    }
    x, want = {}, {}
    for case, (name, shape, axis, group) in cases.items():
        x[case], want[case] = quantized_by_groups(name, shape, axis, group)

    @jax.jit
    def run(x):
        stored, back = {}, {}
        for case, (name, _, axis, group) in cases.items():
            one = lambda x, n=name, a=axis, g=group: frugax.formats.quantize(x, n, axis=a, group_size=g)  # noqa: E731
            stored[case] = jax.vmap(one)(jnp.stack([x[case], 2 * x[case]]))
            first = jax.tree.map(lambda x: x[0], stored[case])
            back[case] = stored[case].dequantize(), first.dequantize(jnp.bfloat16)
        return stored, back

    stored, back = run(x)
    for case, (_, shape, _, _) in cases.items():
        assert stored[case].shape == (2, *shape)
        assert jax.tree.map(lambda x: x[0], stored[case]).shape == shape
        np.testing.assert_allclose(back[case][0], np.stack([want[case], 2 * want[case]]), rtol=4 * EPS)
        assert back[case][1].dtype == jnp.bfloat16


TENSORS = ("int3", "dynamic8")


def quantized_by_groups(name, shape, axis, group):
    """(x, what is stored of it): numbers, of which the first group is tiny or zero."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = np.moveaxis(x, axis, -1)
    size = group or x.shape[-1]
    x[..., :size] *= 0 if group == 4 else 1e-20
    want, values = np.zeros_like(x), table(name)
    for start in range(0, x.shape[-1], size):
        part = x[..., start : start + size]
        scale = np.abs(part).max(-1, keepdims=True) / np.float32(values[-1] + (name == "int3") / 2)
        unit = part / np.where(scale == 0, 1, scale)
        nearest = np.abs(unit.astype(np.float64)[..., None] - values).argmin(-1)
        want[..., start : start + size] = values[nearest] * scale
    return np.moveaxis(x, -1, axis), np.moveaxis(want, -1, axis)


def test_bytes():
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    quantize = lambda n: jax.eval_shape(lambda x: frugax.formats.quantize(x, n, group_size=128), x)  # noqa: E731
    sizes = {n: quantize(n).nbytes for n in ("int3", "int4", "dynamic8")}
    assert sizes == {"int3": 256 * 64 * 3 // 8 + 512, "int4": 128 * 64 + 512, "dynamic8": 256 * 64 + 512}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(x=jnp.ones(3, jnp.int32)), "x: got int32"),
        (dict(x=jnp.ones(())), "at least one axis"),
        (dict(x=jnp.ones((2, 3)), axis=2), "axis: got 2"),
        (dict(x=jnp.ones(3), group_size=0), "group_size: got 0"),
        (dict(x=jnp.ones(3), group_size="2"), "group_size: got '2'; expected an integer"),
        (dict(x=jnp.ones(3), group_size=2.0), "group_size: got 2.0; expected an integer"),
        (dict(x=jnp.ones(3), format=["int4", 2]), "format: got ..int4', 2.; expected one of int1"),
        (dict(x=jnp.ones(3), format="int9"), "one of int1"),
        (dict(x=jnp.ones(3), group_size=2, partial_group=False), "group_size: got 2 for 3 elements"),
        (dict(x=jnp.ones((3, 3)), format="ternary", group_size=2), "one scale a matrix"),
        (dict(x=jnp.ones(3), rounding="up"), "rounding: got 'up'"),
        (dict(x=jnp.ones(3), rounding="stochastic"), "key: got None"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(arguments, says):
    with pytest.raises(ValueError, match=says):
        frugax.formats.quantize(**{"format": "int8", **arguments})
