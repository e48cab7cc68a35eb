"""Ternary values between the ends of a group, against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from frugax.formats import quantize, ternary_minmax
from frugax.layers.modules.packed import take_rows
from tests.formats.test_schemes import groups


def test_it_is_its_definition():
    x = groups()
    low, high = (
        end.astype(ml_dtypes.bfloat16).astype(np.float32)[..., None]
        for end in (np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0))
    )
    want = np.where(x > high / 2, high, np.where(x < low / 2, low, 0))
    q = jax.jit(lambda x: quantize(x, "ternary_minmax", axis=-1))(x)
    np.testing.assert_array_equal(q.dequantize(), want)
    assert q.nbytes == x.size / 4 + 4 * 24 * 2  # two bits a value, two bfloat16 a group
    assert (np.abs(want - x).max(-1) <= np.maximum(high, -low)[..., 0] * 0.51).all()

    covering = ternary_minmax.covering()
    least, most = covering.scheme.ends(covering.fit(jnp.asarray(x)))
    assert (least <= x.min(-1)).all() or (x.min(-1) > 0).any()
    assert (most >= x.max(-1)).all()
    assert (most <= np.maximum(x.max(-1), 0) * (1 + 2**-7)).all()


def test_stochastic_rounding_is_unbiased():
    """Each value becomes an end as often as its share of the way to it says, the largest nearly always."""
    x, n = jnp.asarray(groups()[9, 0]), 4000
    keys = jax.random.split(jax.random.key(0), n)
    run = lambda key: quantize(x, "ternary_minmax", rounding="stochastic", key=key).dequantize()  # noqa: E731
    drawn = np.asarray(jax.jit(jax.vmap(run))(keys), np.float64)
    end = np.where(x > 0, drawn.max(), drawn.min())
    share = x / end
    assert set(np.unique(drawn)) == {drawn.min(), 0.0, drawn.max()}
    assert (share <= 1).all()
    assert (np.abs(drawn.mean(0) / end - share) < 6 * np.sqrt(share * (1 - share) / n) + 3 / n).all()


def test_codes_of_a_group_step_by_step():
    x = jnp.array([[-2.0, -0.9, 1.0, 3.0]])
    scaling = ternary_minmax.fit(x)
    codes = ternary_minmax.encode(x, scaling)
    assert codes.tolist() == [[-1, 0, 0, 1]]
    up = ternary_minmax.next(codes, jnp.array([[True, False, True, True]]), scaling)
    assert ternary_minmax.decode(up, scaling).tolist() == [[0.0, -2.0, 3.0, 3.0]]


@pytest.mark.nan
def test_rows_of_an_embedding():
    w = jnp.asarray(groups()[:, 0])

    @jax.jit
    def run(w):
        q = quantize(w, "ternary_minmax", axis=-1, group_size=8)
        return take_rows(q, jnp.array([5, 0, 99]), jnp.float32), q.dequantize()

    rows, whole = run(w)
    np.testing.assert_array_equal(rows[:2], whole[np.array([5, 0])])
    assert np.isnan(rows[2]).all()
