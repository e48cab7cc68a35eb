"""Outlier-victim pairs against an exhaustive search, and against integers of as many bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.formats import AbsMax, Format, Integer, LeastSquares, Scaling, format_named, quantize

ABFLOATS = {4: [12, 16, 24, 32, 48, 64, 96]}
ABFLOATS[8] = [2.0 ** (7 + e) * (1 + m / 32) for e in range(4) for m in range(32)][1:]


def every_pair(bits: int):
    """(codes, values) of every pair that a tensor can hold, [n, 2] each."""
    h, victim = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    integers = np.arange(-h, h + 1)
    plain = np.stack(np.meshgrid(integers, integers), -1).reshape(-1, 2)
    magnitude = np.arange(1, h + 1)
    outliers = np.concatenate([magnitude, magnitude + victim])  # sign and magnitude in bits
    values = np.concatenate([ABFLOATS[bits], -np.array(ABFLOATS[bits])])
    codes = [plain, np.stack([outliers, np.full(2 * h, victim)], 1)]
    of_codes = [plain, np.stack([values, np.zeros(2 * h)], 1)]
    codes, of_codes = (np.concatenate([*x, x[-1][:, ::-1]]) for x in (codes, of_codes))
    return codes, of_codes.astype(np.float64)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.full)])
def test_pairs_are_their_definition(bits):
    """Every pair of codes has its value; of all pairs, that of the least squared error is stored."""
    format = format_named(f"olive{bits}")
    codes, values = every_pair(bits)
    scaling = Scaling(jnp.ones((1, 1)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 2)) * 10 ** rng.uniform(0, 1.5, (300, 2)) * 2 ** (bits - 4)
    x[0], x[1], x[2] = (0, 0), (1e6, 3), (40, 41)
    x = x.astype(np.float32)

    @jax.jit
    def run(x, codes):
        got = format.encode(x[:, None], scaling)
        return got[:, 0], format.decode(got, scaling)[:, 0], format.decode(codes[:, None], scaling)[:, 0]

    got, back, decoded = (np.asarray(part) for part in run(x, codes))
    np.testing.assert_array_equal(decoded, values)
    least = np.array([((row - values) ** 2).sum(1).min() for row in x.astype(np.float64)])
    np.testing.assert_allclose(((back - x) ** 2).sum(1), least, rtol=1e-5)
    victims = (got == -(2 ** (bits - 1))).sum(1)
    assert victims.max() == 1
    assert 30 < victims.sum() < 270


def test_integers_where_there_are_no_outliers():
    """Codes are those of integers under the same scale, and no group has more error than with int4."""
    rng = np.random.default_rng(1)
    even = rng.uniform(-1, 1, (256, 4)).astype(np.float32)
    tailed = rng.standard_t(3, (256, 60)).astype(np.float32)
    x = np.concatenate([even, tailed], 1)
    olive, int4 = format_named("olive4"), format_named("int4")

    @jax.jit
    def run(x):
        q = quantize(x, olive, group_size=64)
        integers = int4.encode(x.T.reshape(-1, 4, 64), q.scaling())
        return q.unpacked(), integers.reshape(-1, 256), q.dequantize(), quantize(x, int4, group_size=64)

    codes, integers, back, plain = run(x)
    np.testing.assert_array_equal(codes[:4], integers[:4])
    assert (np.asarray(codes[4:]) == -8).any()
    errors = [((np.asarray(y) - x).reshape(4, 64, 64) ** 2).sum(1) for y in (back, plain.dequantize())]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.full)])
def test_heavy_tails_cost_less_than_in_integers(bits):
    """The error of X W where one of both is stored, in as many bytes as integers take; clipped ones too."""
    rng = np.random.default_rng(2)
    injected = rng.standard_normal((256, 32))
    injected[rng.random(injected.shape) < 0.01] *= 20
    integer = Integer("integer", bits, True)
    formats = {
        "olive": format_named(f"olive{bits}"),
        "absmax": Format("absmax", integer, AbsMax()),
        "clipped": Format("clipped", integer, LeastSquares(steps=32, least=0.05)),
    }

    @jax.jit
    def run(tailed, other):
        """(what is stored, errors as weights of x = `other`, as inputs, a column a token, of w = `other`)"""
        found = {}
        for name, format in formats.items():
            q = quantize(tailed, format)
            off = q.dequantize() - tailed
            weights = jnp.mean((other.T @ off) ** 2) / jnp.mean((other.T @ tailed) ** 2)
            inputs = jnp.mean((off.T @ other) ** 2) / jnp.mean((tailed.T @ other) ** 2)
            found[name] = q, {"weights": jnp.sqrt(weights), "inputs": jnp.sqrt(inputs)}
        return found

    other = rng.standard_normal((256, 48)).astype(np.float32)
    for tailed in (injected, rng.standard_t(3, (256, 32))):
        found = run(tailed.astype(np.float32), other)
        for what in ("weights", "inputs"):
            error = {name: float(errors[what]) for name, (_, errors) in found.items()}
            # Of 8 bits, integers alone reach most outliers.
            assert error["olive"] < (0.9 if bits == 4 else 1.0) * error["absmax"], (what, error)
            assert error["olive"] < (0.95 if bits == 4 else 1.0) * error["clipped"], (what, error)
        assert {q.nbytes for q, _ in found.values()} == {256 * 32 * bits // 8 + 4 * 32}


def test_what_cannot_be_paired():
    for shape, size in (((7, 2), None), ((8, 2), 3)):
        got = r"group_size: got 3" if size else r"x: got \[7, 2\]"
        with pytest.raises(ValueError, match=f"{got}; expected an even number along axis 0: olive4"):
            quantize(jnp.ones(shape), "olive4", group_size=size)
    olive = format_named("olive4")
    scaling = olive.fit(jnp.ones((3, 1, 8)))
    with pytest.raises(ValueError, match="group_size: got 1; expected an even number"):
        olive.encode(jnp.ones((3, 1, 1)), scaling)
    for call in (olive.element.encode, olive.element.decode):
        with pytest.raises(ValueError, match=r"format: got olive4, in which .* each; expected Format"):
            call(jnp.ones(4))
    covered = dataclasses.replace(olive, scheme=olive.scheme.covering())
    np.testing.assert_allclose(covered.fit(jnp.ones((3, 1, 8)) * 7).scales, 1, rtol=1e-6)
