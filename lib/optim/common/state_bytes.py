"""The memory that an optimizer's state takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def state_bytes(state: Any) -> int:
    """Count the bytes of all arrays of a tree in memory; 4-bit integers count half a byte.

    Args:
      state: any tree of arrays or `jax.ShapeDtypeStruct`: `jax.eval_shape(optimizer.init, params)` tells
        what a state will take before there is one.

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> frugax.optim.state_bytes(optax.adam(1e-3).init(jnp.ones(10)))
        84
    """
    return sum(math.ceil(leaf.size * _bits(leaf.dtype) / 8) for leaf in jax.tree.leaves(state))


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits
    return 8 * dtype.itemsize
