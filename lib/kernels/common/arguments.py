"""Argument checks that every operation shares."""

from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import Array


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of states and sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def as_shaped(x):
    """Anything with a shape and a dtype; lists and numpy arrays become jax arrays."""
    return x if x is None or isinstance(x, jax.ShapeDtypeStruct | Array) else jnp.asarray(x)


def reject(name: str, x: Array | jax.ShapeDtypeStruct, expected: str) -> NoReturn:
    """Raise the ValueError that names an argument, what it is, and what was expected."""
    raise ValueError(f"{name}: got {x.dtype}{list(x.shape)}; expected {expected}")
