"""The portable form, which CPU gets: tile by tile, packed experts decoded one at a time."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import operand_dtype
from . import rows
from .bilinear import product
from .decode import decoded, stored
from .inputs import Inputs, Spec


def forward(call: Inputs, spec: Spec) -> Array:
    """The call's result, in lhs's dtype."""
    return rows.forward(call, spec, _products(call, spec))


def backward(call: Inputs, cotangent: Array, spec: Spec) -> Inputs:
    """The gradients of lhs, rhs and weights."""
    return rows.backward(call, spec, cotangent, _products(call, spec))


def _products(call: Inputs, spec: Spec) -> rows.Products:
    """The three products by tiles."""
    sizes, decode = call.group_sizes, None
    if call.rhs is not None:
        experts: tuple[Array, ...] = (call.rhs,)
    else:
        arrays = stored(call)
        experts = tuple(arrays.values())
        decode = _Decode(spec, tuple(arrays), operand_dtype(call.lhs.dtype))
    return rows.Products(
        forward=lambda x: product("rows", x, experts, sizes, decode),
        backward=lambda dy: product("transposed", dy, experts, sizes, decode),
        experts=lambda x, dy: product("experts", x, (dy,), sizes, None),
    )


class _Decode(NamedTuple):
    """A function of an expert's number and the stored arrays, by these names: its matrix [K, N]."""

    spec: Spec
    names: tuple[str, ...]
    dtype: jnp.dtype

    def __call__(self, e: Array, *stored: Array) -> Array:
        of_e = (lax.dynamic_index_in_dim(x, e, keepdims=False) for x in stored)
        return decoded(dict(zip(self.names, of_e, strict=True)), self.spec, self.dtype)
