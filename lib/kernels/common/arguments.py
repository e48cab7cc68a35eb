"""Argument checks that every operation shares."""

from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array


def accumulator(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype of states and sums: float32, or float64 if any input is."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def operand_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a product's operands: the input's, but float32 for float16, whose range holds no sums."""
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else dtype


def rates(A: Array, dtype: jnp.dtype) -> Array:
    """Rates A <= 0 of decay in `dtype`, none below -1e30, at which a step of 1e-28 forgets all.

    Of A = -exp(A_log) an extreme parameter makes infinity, and 0 * A would be NaN, here and in gradients.
    """
    return jnp.maximum(A.astype(dtype), jnp.asarray(-1e30, dtype))


def known(size: Any) -> bool:
    """Say whether a size is a number, not a symbol, as in programs exported for any batch or length."""
    return isinstance(size, int)


def as_shaped(x):
    """Anything with a shape and a dtype; lists and numpy arrays become jax arrays."""
    return x if x is None or isinstance(x, jax.ShapeDtypeStruct | Array) else jnp.asarray(x)


def reject(name: str, x: Array | jax.ShapeDtypeStruct, expected: str) -> NoReturn:
    """Raise the ValueError that names an argument, what it is, and what was expected."""
    raise ValueError(f"{name}: got {x.dtype}{list(x.shape)}; expected {expected}")


def pad_to(x: Array, shape: Sequence[int], value: float = 0) -> Array:
    """x with `value` behind its end along every axis, up to `shape`.

    Example:
        >>> import jax.numpy as jnp
        >>> pad_to(jnp.ones((1, 2)), (2, 3), 7.0).tolist()
        [[1.0, 1.0, 7.0], [7.0, 7.0, 7.0]]
    """
    if x.shape == tuple(shape):
        return x
    widths = [(0, to - size) for size, to in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype))


def trim(x: Array, shape: Sequence[int]) -> Array:
    """The first `shape` of x: what `pad_to` was given."""
    return x if x.shape == tuple(shape) else x[tuple(slice(size) for size in shape)]
