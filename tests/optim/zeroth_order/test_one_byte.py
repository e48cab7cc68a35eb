"""Codes of one byte: their values, their precision, and the byte that stands for no finite slope."""

import jax
import numpy as np
import pytest

from frugax.optim.zeroth_order.one_byte import code_named


@pytest.mark.parametrize("code", ["dynamic", "log"])
def test_a_byte_of_a_slope(code):
    """Every byte but 255 is a value that encodes to it; slopes lose half a step; 255 is for no number."""
    encode, decode = map(jax.jit, code_named(code))
    every = np.arange(255, dtype=np.uint8)
    values = np.asarray(decode(every))
    assert len(np.unique(values)) == 255
    steps = np.geomspace(1e-5, 2, 300).astype(np.float32)
    asked = np.concatenate([values, steps, -steps, [0, 1e-12, np.nan, np.inf, -np.inf]]).astype(np.float32)
    codes = np.asarray(encode(asked))
    np.testing.assert_array_equal(codes[:255], every)
    assert codes[-3:].tolist() == [255] * 3
    assert (codes[:-3] != 255).all()
    got, x = np.asarray(decode(codes)), np.clip(asked[:-3], -1, 1)
    assert got[-5:].tolist() == [0] * 5
    nearest = values[np.abs(values[None] - x[255:-2, None]).argmin(1)]
    if code == "dynamic":
        np.testing.assert_allclose(got[255:-5], nearest, rtol=1e-5)
    else:  # nearest by its logarithm
        assert (np.abs(np.log(got[255:-5] / x[255:-2])) < 1 / 16 + 1e-4).all()


@pytest.mark.usefixtures("unchecked_types")
def test_an_unknown_code():
    with pytest.raises(ValueError, match="code: got 'linear'"):
        code_named("linear")
