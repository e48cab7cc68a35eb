"""The portable form, which CPU gets."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import accumulator
from ..quantized_matmul.inputs import weights
from . import rows
from .inputs import Inputs, Spec, expert, shape


def forward(call: Inputs, spec: Spec) -> Array:
    """The call's result, in lhs's dtype."""
    dtype = accumulator(call.lhs.dtype)
    E, *_ = shape(call, spec)
    rhs = call.rhs
    if rhs is None:
        rhs = jax.vmap(lambda e: weights(*expert(call, spec, e)).dequantize(dtype))(jnp.arange(E))

    def product(x: Array) -> Array:
        y = lax.ragged_dot(
            x.astype(dtype), rhs.astype(dtype), call.group_sizes, precision=lax.Precision.HIGHEST
        )
        return jnp.where(rows.real(call)[:, None], y, 0)

    y = product(rows.gathered(call, call.lhs))
    return rows.scattered(call, spec, y).astype(call.lhs.dtype)
