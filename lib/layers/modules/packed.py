"""Params that may be packed: a layer reads an array or a `QuantizedTensor` under the same name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax import Array
from jax.typing import DTypeLike

from ...formats import AbsMax, Asymmetric, MinMax, QuantizedTensor, check_storage
from ...formats.minmax import NO_ENDS
from ...kernels import quantized_matmul
from ...kernels.common.arguments import accumulator
from ...kernels.common.operation import Backend

Matrix = Array | QuantizedTensor


def matrix_param(
    module: nn.Module,
    name: str,
    init: Any,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    packed: tuple[Any, ...] = (QuantizedTensor,),
) -> Any:
    """Do as `module.param` does, but take a packed matrix of this shape for an array.

    Args:
      packed: the types of packed matrices that the module can multiply by.

    Raises:
      ScopeParamShapeError: the param has another shape.
    """
    if module.has_variable("params", name):
        value = nn.meta.unbox(module.get_variable("params", name))
        if isinstance(value, packed):
            if value.shape != shape:
                raise ScopeParamShapeError(name, "/".join(module.path), value.shape, shape)
            return value
    return module.param(name, init, shape, dtype)


def as_array(w: Matrix, dtype: DTypeLike) -> Array:
    """The matrix in `dtype`, decoded if it is packed."""
    return w.dequantize(dtype) if isinstance(w, QuantizedTensor) else w.astype(dtype)


def take_rows(w: Matrix, index: Array, dtype: DTypeLike) -> Array:
    """Row w[index] of w [V, D] for each index [...], [..., D] in `dtype`; NaN for an index that is none's.

    Of a packed w, in groups along D, no other rows are decoded.
    """
    how = {"axis": 0, "mode": "fill"}
    if not isinstance(w, QuantizedTensor):
        return jnp.take(w, index, fill_value=jnp.nan, **how).astype(dtype)
    check_storage(w)
    groups = -(-w.shape[-1] // w.group_size)
    ends = isinstance(w.format.scheme, MinMax)
    whole = ends or isinstance(w.format.scheme, Asymmetric)  # a scale alone would lose ends or zeros
    scales = w.scales if whole else jnp.broadcast_to(w.format.scale(w.scaling()), (w.shape[0], groups))
    zeros, choices = (x if x is None else jnp.take(x, index, **how) for x in (w.zeros, w.choices))
    rows = dataclasses.replace(
        w,
        codes=jnp.take(w.codes, index, fill_value=0, **how),
        scales=jnp.take(scales, index, fill_value=NO_ENDS if ends else jnp.nan, **how),
        zeros=zeros,
        choices=choices,
        format=w.format if whole else dataclasses.replace(w.format, scheme=AbsMax()),
    )
    return rows.dequantize(dtype)


def times_transposed(x: Array, w: Matrix, *, backend: Backend | None = None) -> Array:
    """x [..., D] times the transpose of w [V, D], in float32 (float64 if x is)."""
    wide = accumulator(x.dtype)
    if not isinstance(w, QuantizedTensor):
        axes = (((x.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, w.astype(x.dtype), axes, preferred_element_type=wide)
    columns = dataclasses.replace(jax.tree.map(lambda a: a.swapaxes(-1, -2), w), axis=-2)
    return quantized_matmul(x.astype(wide), columns, backend=backend)
