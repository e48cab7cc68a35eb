"""Rows read by `gather` and added up by `scatter`, and the chain rule of both around a backend's products.

A backend that fuses neither has only the two products to write: `Products`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator
from .inputs import Inputs, Spec


class Products(NamedTuple):
    """A backend's products for a call, of rows in the order of experts; rows past all groups give zeros.

    Attributes:
      forward: x [M, K] -> [M, N], row i times its own expert.
      backward: dy [M, N] -> [M, K], row i times its own expert transposed.
      experts: x [M, K], dy [M, N] -> [E, K, N], the sum of x_i dy_i^T over an expert's rows.
    """

    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]
    experts: Callable[[Array, Array], Array]


def forward(call: Inputs, spec: Spec, products: Products) -> Array:
    """The call's result, in lhs's dtype."""
    y = products.forward(gathered(call, call.lhs))
    return scattered(call, spec, y).astype(call.lhs.dtype)


def backward(call: Inputs, spec: Spec, dout: Array, products: Products) -> Inputs:
    """The gradients of lhs, of float rhs and of weights; zeros of packed experts' scales."""
    x = gathered(call, call.lhs)
    dy = dout if call.scatter is None else read(dout, call.scatter)
    dx = products.backward(dy)
    grads: dict[str, Array] = {}
    if call.weights is not None:
        # y_i . dy_i = x_i W . dy_i = x_i . (dy_i W^T): no y is kept, nor computed again.
        dtype = accumulator(x.dtype)
        each = jnp.sum(x.astype(dtype) * dx.astype(dtype), 1)
        grads["weights"] = jnp.where(real(call), each, 0).astype(call.weights.dtype)
        weights = call.weights.astype(dtype)[:, None]
        dx, dy = dx * weights, (dy.astype(dtype) * weights).astype(x.dtype)
    if call.rhs is not None:
        grads["rhs"] = products.experts(x, dy).astype(call.rhs.dtype)
    if call.gather is not None:
        dx = add(dx, call.gather, call.lhs.shape[0], call.rows_of)
    return gradients(call, lhs=dx.astype(call.lhs.dtype), **grads)


def gradients(call: Inputs, **grads: Array | None) -> Inputs:
    """The gradients of a call: those given, and zeros of all other floats."""
    zeros = (
        jnp.zeros_like(a) if a is not None and jnp.issubdtype(a.dtype, jnp.floating) else None for a in call
    )
    return Inputs(*zeros)._replace(**grads)


def gathered(call: Inputs, lhs: Array) -> Array:
    """The rows [M, K] in the order of experts."""
    return lhs if call.gather is None else read(lhs, call.gather)


def scattered(call: Inputs, spec: Spec, y: Array) -> Array:
    """Rows y [M, N] times their weights, added up to [out_rows, N] if the call says so."""
    if call.scatter is None or spec.out_rows is None:
        return y
    if call.weights is not None:
        dtype = accumulator(y.dtype)
        y = jnp.where(real(call)[:, None], y.astype(dtype) * call.weights.astype(dtype)[:, None], 0)
    return add(y, call.scatter, spec.out_rows, call.rows_of)


def real(call: Inputs) -> Array:
    """Say which of the M rows belong to a group, [M]."""
    rows = call.lhs if call.gather is None else call.gather
    return jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.sum(call.group_sizes, dtype=jnp.int32)


def read(x: Array, index: Array) -> Array:
    """Rows of x; zeros where the index is past the last."""
    return x.at[index].get(mode="fill", fill_value=0)


def add(y: Array, index: Array, count: int, rows_of: Array | None) -> Array:
    """Rows y added up by `index`, in float32 at least; those with an index past the last are left out.

    Where the rows of each result are known they are read, which is faster than to add what others may add to.
    """
    y = y.astype(accumulator(y.dtype))
    if rows_of is not None:
        return jnp.sum(read(y, rows_of), 1)
    return jnp.zeros((count, y.shape[1]), y.dtype).at[index].add(y, mode="drop")
