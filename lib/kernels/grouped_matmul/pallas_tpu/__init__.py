"""Rows times the matrix of their group on TPU, and both gradients.

Sixteen rows of bfloat16 share a register, so no copy between memories can move a single one: XLA gathers and
scatters rows around the kernels.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from ...common.chips import VMEM_LIMIT
from .. import rows
from ..inputs import Inputs, Spec, shape
from . import packed
from .outer import outer_sums
from .packed import Packed
from .product import multiply
from .tiling import Tiling, for_outer, for_product


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.lhs.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel multiplies float32 and bfloat16, not {call.lhs.dtype}"
    if call.rhs is None and (reason := packed.unsupported_reason(call, spec)):
        return reason
    _, _, K, N = shape(call, spec)
    if any(_tiling(call, spec, transposed) is None for transposed in (False, True)):
        return f"K={K} and N={N}: the smallest blocks would take more than {VMEM_LIMIT >> 20} MiB of VMEM"
    return None


def forward(call: Inputs, spec: Spec, *, interpret: bool) -> Array:
    """The call's result, in lhs's dtype."""
    return rows.forward(call, spec, _products(call, spec, interpret))


def backward(call: Inputs, cotangent: Array, spec: Spec, *, interpret: bool) -> Inputs:
    """The gradients of lhs, float rhs and weights."""
    return rows.backward(call, spec, cotangent, _products(call, spec, interpret))


def _products(call: Inputs, spec: Spec, interpret: bool) -> rows.Products:
    E, M, K, N = shape(call, spec)
    w: Any = Packed.of(call, spec) if call.rhs is None else call.rhs

    def rows_times(x: Array, transposed: bool) -> Array:
        t = _tiling(call, spec, transposed)
        y = multiply(x, w, call.group_sizes, t, transposed=transposed, interpret=interpret)
        return y[:, : K if transposed else N]

    def experts(x: Array, dy: Array) -> Array:
        t = for_outer(M, K, N, E, itemsize=x.dtype.itemsize)
        return outer_sums(x, dy, call.group_sizes, t, interpret=interpret)

    return rows.Products(
        forward=partial(rows_times, transposed=False),
        backward=partial(rows_times, transposed=True),
        experts=experts,
    )


def _tiling(call: Inputs, spec: Spec, transposed: bool) -> Tiling | None:
    E, M, K, N = shape(call, spec)
    more: dict[str, Any] = {}
    if call.rhs is None:
        more, K = packed.blocks(call, spec, transposed)
    K, N = (N, K) if transposed else (K, N)
    return for_product(M, K, N, E, itemsize=call.lhs.dtype.itemsize, **more)
