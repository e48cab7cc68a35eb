"""BitMoD against its definition: the paper's tables, exhaustive search, and formats of as many bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.formats import AbsMax, Format, Minifloat, format_named, quantize

BASES = {3: [0, 1, 2, 4], 4: [0, 0.5, 1, 1.5, 2, 3, 4, 6]}
SPECIALS = {3: [3, -3, 6, -6], 4: [5, -5, 8, -8]}  # extra resolution, extra asymmetry


def draws() -> dict[str, np.ndarray]:
    """[64 groups, 128], by how they are distributed."""
    rng = np.random.default_rng(0)
    x = {
        "gaussian": rng.standard_normal((64, 128)),
        "heavy": rng.standard_t(4, (64, 128)),
        "skewed": rng.gamma(2, 1, (64, 128)) - 1,
    }
    return {name: value.astype(np.float32) for name, value in x.items()}


def by_definition(x: np.ndarray, bits: int):
    """(values, choices, scales) of groups x [G, g], in float64."""
    found = []
    base, x = np.array(BASES[bits], np.float64), x.astype(np.float64)
    for special in SPECIALS[bits]:
        values = np.sort(np.concatenate([-base[1:], base, [special]]))
        scale = np.abs(x).max(1, keepdims=True) / np.abs(values).max()
        rounded = values[np.abs((x / scale)[..., None] - values).argmin(-1)] * scale
        found.append((rounded, scale))
    error = np.stack([((rounded - x) ** 2).sum(1) for rounded, _ in found])
    choice = error.argmin(0)
    of_choice = [np.stack(part)[choice, np.arange(len(x))] for part in zip(*found, strict=True)]
    return of_choice[0], choice, of_choice[1][:, 0]


@pytest.mark.parametrize("bits", [3, 4])
def test_the_codebook_of_least_error_is_chosen(bits):
    """With exact scales: the definition's numbers, and in no group more error than the plain minifloat."""
    exact = dataclasses.replace(format_named(f"bitmod{bits}"), scheme=AbsMax())
    base = Format("plain", Minifloat.of(2, bits - 3))
    x = np.concatenate(list(draws().values()))

    @jax.jit
    def both(x):
        mine, plain = (quantize(x, f, axis=-1, group_size=128) for f in (exact, base))
        return mine.scaling(), mine.dequantize(), plain.dequantize()

    scaling, got, plain = both(x)
    want, choice, scale = by_definition(x, bits)
    np.testing.assert_array_equal(scaling.choices[:, 0], choice)
    far = exact.fit(jnp.asarray(x * 2.0**90, jnp.float32)[:, None])  # no float32 holds squares of these
    np.testing.assert_array_equal(far.choices, scaling.choices)
    assert set(choice) == {0, 1, 2, 3}
    np.testing.assert_allclose(scaling.scales[:, 0], scale, rtol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    errors = [((np.asarray(y, np.float64) - x) ** 2).sum(1) for y in (got, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()


@pytest.mark.parametrize("bits", [3, 4])
def test_what_is_stored(bits):
    """Scales in 8 bits for each column, choices in two; each value is one of its group's codebook."""
    x = np.stack([part[:, :64] for part in draws().values()], -1).reshape(64 * 64, 3)[: 9 * 128]
    x = np.concatenate([x, 0.1 * x], 1)  # [1152, 6], in columns of different sizes
    q, back = jax.jit(lambda x: (q := quantize(x, f"bitmod{bits}"), q.dequantize()))(x)
    assert q.choices.shape == (3, 6)  # nine groups, four a byte
    assert q.nbytes * 8 == bits * x.size + 8 * 9 * 6 + 8 * 3 * 6 + 32 * 6
    choice = np.asarray(q.scaling().choices)
    scale = np.asarray(q.format.scale(q.scaling()))
    _, want, exact = (np.array(part) for part in by_definition(x.T.reshape(-1, 128), bits))
    np.testing.assert_array_equal(choice.ravel(), want)
    step = exact.reshape(6, 9).max(1, keepdims=True) / 255
    assert (np.abs(scale - exact.reshape(6, 9)) <= step * 0.501).all()
    unit = np.asarray(back).T.reshape(6, 9, 128) / scale[..., None]
    assert len(set(want)) > 2
    for c in set(want):
        special = SPECIALS[bits][c]
        values = np.concatenate([-np.array(BASES[bits]), BASES[bits], [special]])
        off = np.abs(unit[choice == c][..., None] - values).min(-1)
        assert off.max() < 1e-5
        assert (np.abs(unit[choice == c] - special) < 1e-5).any(), "no group needs its special value"


def test_against_the_formats_of_as_many_bits():
    """Less error than asymmetric integers on Gaussian and heavy-tailed groups, more on skewed ones."""
    names = ("bitmod3", "uint3", "bitmod4", "uint4")

    @jax.jit
    def errors(x):
        back = (quantize(x, name, axis=-1, group_size=128).dequantize() for name in names)
        return [jnp.sqrt(jnp.mean((y - x) ** 2) / jnp.mean(x**2)) for y in back]

    found = {name: dict(zip(names, errors(x), strict=True)) for name, x in draws().items()}
    for distribution in ("gaussian", "heavy"):
        assert found[distribution]["bitmod3"] < 0.95 * found[distribution]["uint3"]
        assert found[distribution]["bitmod4"] < found[distribution]["uint4"]
    assert found["skewed"]["uint4"] < 0.9 * found["skewed"]["bitmod4"]


def test_neighbours_and_stochastic_rounding():
    """The next code is the next value of the group's codebook, the special one included."""
    format = format_named("bitmod4")
    codes = jnp.arange(16)
    for element in format.elements:
        values = np.asarray(element.decode(codes))
        order = np.argsort(values)
        order = order[values[order] != 0].tolist()
        order.insert(sum(values[order] < 0), 0)
        up = np.asarray(element.next(codes, jnp.full(16, True)))
        down = np.asarray(element.next(codes, jnp.full(16, False)))
        assert len(order) == 16
        np.testing.assert_array_equal(up[order], order[1:] + order[-1:])
        np.testing.assert_array_equal(down[order], order[:1] + order[:-1])
        assert element.largest == np.abs(values).max()
