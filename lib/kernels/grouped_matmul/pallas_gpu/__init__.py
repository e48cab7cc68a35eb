"""Rows times the matrix of their group on Hopper (Mosaic GPU), and both gradients."""

from functools import partial

import jax.numpy as jnp
from jax import Array

from ...common import compat
from .. import rows, xla
from ..inputs import Inputs, Spec, shape
from . import packed
from .experts import gradient
from .product import product
from .tiling import DEPTH


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    _, _, K, N = shape(call, spec)
    if call.rhs is None:
        return packed.unsupported_reason(call, spec)
    if call.lhs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the GPU kernel multiplies bfloat16 and float16, not {call.lhs.dtype}"
    if K % DEPTH or N % DEPTH:
        got = f"K={K} and N={N}"
        return f"the GPU kernel takes K and N by {DEPTH}, not {got}: experts are never copied to pad them"
    return compat.local_gpu_lacks_mosaic()


def forward(call: Inputs, spec: Spec, *, interpret: bool) -> Array:
    """The call's result, in lhs's dtype."""
    if unsupported_reason(call, spec) is not None:  # of a shard, which has fewer columns than the call
        return xla.forward(call, spec)
    return rows.forward(call, spec, _products(call, spec, interpret))


def backward(call: Inputs, cotangent: Array, spec: Spec, *, interpret: bool) -> Inputs:
    """The gradients of lhs, rhs and weights."""
    if unsupported_reason(call, spec) is not None:
        return xla.backward(call, cotangent, spec)
    return rows.backward(call, spec, cotangent, _products(call, spec, interpret))


def _products(call: Inputs, spec: Spec, interpret: bool) -> rows.Products:
    if call.rhs is None:
        return packed.products(call, spec, interpret=interpret)
    multiply = partial(product, w=call.rhs, group_sizes=call.group_sizes, interpret=interpret)
    return rows.Products(
        forward=partial(multiply, transposed=False),
        backward=partial(multiply, transposed=True),
        experts=partial(gradient, group_sizes=call.group_sizes, interpret=interpret),
    )
