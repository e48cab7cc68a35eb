"""The error of tests: rmse over the rms of the reference, bounded by what the dtype explains."""

import jax
import jax.numpy as jnp
import numpy as np

# A sum in float32 of thousands of terms loses some tens of units in the last place. A bfloat16 kernel adds up
# in float32, so what remains is the rounding of a few operands, each half a unit at most (eps is one unit).
_UNITS = {"float64": 2**10, "float32": 2**6, "float16": 2, "bfloat16": 1}


def bound(dtype) -> float:
    """The largest error that `dtype` explains."""
    dtype = jnp.dtype(dtype)
    return _UNITS[dtype.name] * float(jnp.finfo(dtype).eps)


def error(actual, expected) -> float:
    """rmse(actual - expected) / rms(expected); inf where actual is not finite or shapes differ."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    rms = np.sqrt(np.mean(expected**2))
    assert rms > 0, "the reference is all zeros: the comparison could not fail"
    return float(np.sqrt(np.mean((actual - expected) ** 2)) / rms)


def assert_close(actual, expected, dtype, *, times: float = 1.0, name: str = "") -> None:
    """Every leaf of `actual` within `times` bounds of `expected`'s, and no bound that zeros would meet."""
    limit = times * bound(dtype)
    assert limit < 0.5, f"{name}: a bound of {limit} is no test"
    want = jax.tree_util.tree_leaves_with_path(expected)
    got = jax.tree_util.tree_leaves_with_path(actual)
    assert [path for path, _ in got] == [path for path, _ in want], f"{name}: the trees differ"
    for (path, a), (_, e) in zip(got, want, strict=True):
        here = f"{name}{jax.tree_util.keystr(path)}"
        assert error(a, e) <= limit, f"{here}: error {error(a, e):.2e} > {limit:.2e}"
