"""The portable form, which CPU gets: tile by tile, packed experts decoded one at a time."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import operand_dtype
from . import rows
from .bilinear import product
from .decode import decoded, stored
from .inputs import Inputs, Spec


def forward(call: Inputs, spec: Spec) -> Array:
    """The call's result, in lhs's dtype."""
    if call.weights is not None:  # each row's own, before it meets others
        y = rows.scattered(call, spec, _Products.of(call, spec).forward(call.lhs, call.gather, None, None))
    else:
        y = _Products.of(call, spec).forward(call.lhs, call.gather, call.scatter, spec.out_rows)
    return y.astype(call.lhs.dtype)


def backward(call: Inputs, cotangent: Array, spec: Spec) -> Inputs:
    """The gradients of lhs, rhs and weights."""
    products = _Products.of(call, spec)
    if call.weights is not None:
        return rows.backward(call, spec, cotangent, products.plain())
    read = call.gather, call.scatter
    out_rows = None if call.gather is None else call.lhs.shape[0]
    lhs = products.transposed(cotangent, *read, out_rows).astype(call.lhs.dtype)
    rhs = None if call.rhs is None else products.experts(call.lhs, cotangent, *read).astype(call.rhs.dtype)
    return rows.gradients(call, lhs=lhs, rhs=rhs)


class _Products(NamedTuple):
    """The three products by tiles, of rows that may be read by a map `of_x` or `of_y`, or added up by it."""

    stored: tuple[Array, ...]
    sizes: Array
    decode: "_Decode | None"

    @classmethod
    def of(cls, call: Inputs, spec: Spec) -> "_Products":
        if call.rhs is not None:
            return cls((call.rhs,), call.group_sizes, None)
        arrays = stored(call)
        decode = _Decode(spec, tuple(arrays), operand_dtype(call.lhs.dtype))
        return cls(tuple(arrays.values()), call.group_sizes, decode)

    def forward(self, x: Array, of_x: Array | None, of_y: Array | None, out_rows: Any) -> Array:
        return product("rows", x, self.stored, self.sizes, self.decode, of_x=of_x, of_y=of_y, rows=out_rows)

    def transposed(self, dy: Array, of_x: Array | None, of_y: Array | None, out_rows: Any) -> Array:
        how = {"of_x": of_x, "of_y": of_y, "rows": out_rows}
        return product("transposed", dy, self.stored, self.sizes, self.decode, **how)

    def experts(self, x: Array, dy: Array, of_x: Array | None, of_y: Array | None) -> Array:
        return product("experts", x, (dy,), self.sizes, None, of_x=of_x, of_y=of_y)

    def plain(self) -> rows.Products:
        """The products of rows in the order of experts."""
        return rows.Products(
            forward=lambda x: self.forward(x, None, None, None),
            backward=lambda dy: self.transposed(dy, None, None, None),
            experts=lambda x, dy: self.experts(x, dy, None, None),
        )


class _Decode(NamedTuple):
    """A function of an expert's number and the stored arrays, by these names: its matrix [K, N]."""

    spec: Spec
    names: tuple[str, ...]
    dtype: jnp.dtype

    def __call__(self, e: Array, *stored: Array) -> Array:
        of_e = (lax.dynamic_index_in_dim(x, e, keepdims=False) for x in stored)
        return decoded(dict(zip(self.names, of_e, strict=True)), self.spec, self.dtype)
