"""The three products of rows and experts as one JAX primitive: each has the other two as derivatives.

With rows x [M, K], y [M, N] in the order of experts W [E, K, N]:

    "rows"        (x, W) -> [M, N]     x_i W_e(i)
    "transposed"  (y, W) -> [M, K]     y_i W_e(i)^T
    "experts"     (x, y) -> [E, K, N]  sum of x_i y_i^T over the rows of each expert

Row i may stand anywhere in x and in y, where its maps say: operands are read and results added up there.
Loops with as many steps as there are tiles can't be differentiated in reverse; and of a `scan` JAX would add
up the gradient of all experts at every step.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..common.arguments import known
from . import tiles

Decode = Callable[..., Array]  # (expert's number, *stored arrays) -> [K, N]


class Maps(NamedTuple):
    """The maps that a product has: static and hashable.

    Attributes:
      x: rows [M, K] have a map.
      y: rows [M, N] have one.
      rows: number of the result's rows, if they are added up.
    """

    x: bool = False
    y: bool = False
    rows: Any = None


def product(
    kind: str,
    x: Array,
    experts: tuple[Array, ...],
    sizes: Array,
    decode: Decode | None,
    *,
    of_x: Array | None = None,
    of_y: Array | None = None,
    rows: Any = None,
) -> Array:
    """The product, in float32 at least; differentiable in x and in float experts, any number of times.

    Args:
      kind: "rows", "transposed" or "experts".
      x: rows; of "transposed" y.
      experts: W; or the stored arrays of packed experts, which are constants; or of "experts" y.
      sizes: int32 [E].
      decode: makes one expert of the stored arrays. Hashable. None: they are W.
      of_x: where row i stands in x, or in a result of x's shape, int32 [M]; None: row i. Past the last row
        zeros are read, and nothing is added.
      of_y: the same of y.
      rows: number of the result's rows, if they are added up.
    """
    maps = Maps(of_x is not None, of_y is not None, rows)
    given = tuple(a for a in (of_x, of_y) if a is not None)
    traced = _function(kind, decode, maps).trace(x, sizes, *given, *experts)
    out = traced.jaxpr.out_avals[0]
    return _PRODUCT.bind(x, sizes, *given, *experts, kind=kind, decode=decode, maps=maps, out=out)


def _run(kind: str, decode: Decode | None, maps: Maps, x: Array, sizes: Array, *rest: Array) -> Array:
    of_x, of_y, experts = _split(maps, rest)
    if kind == "experts":
        (y,) = experts
        return tiles.by_groups(x, y, sizes, read_x=of_x, read_y=of_y)

    def matrix(e: Array) -> Array:
        return decode(e, *experts) if decode else lax.dynamic_index_in_dim(*experts, e, keepdims=False)

    transposed = kind == "transposed"
    read, add = (of_y, of_x) if transposed else (of_x, of_y)
    width = jax.eval_shape(matrix, sizes[0]).shape[0 if transposed else 1]
    how: dict[str, Any] = {"read": read, "add": add, "out_rows": maps.rows}
    return tiles.by_rows(x, matrix, sizes, width, transposed=transposed, **how)


def _split(maps: Maps, rest: Sequence[Any]) -> tuple[Any, Any, tuple[Any, ...]]:
    """Tell the maps of x and of y, None where there are none, from the experts."""
    left = iter(rest)
    return (next(left) if maps.x else None), (next(left) if maps.y else None), tuple(left)


def _function(kind: str, decode: Decode | None, maps: Maps) -> Any:
    """The jitted product; sizes without a number, of exported programs, can't be compared, nor looked up."""
    return (_jitted if maps.rows is None or known(maps.rows) else _jitted.__wrapped__)(kind, decode, maps)


@functools.lru_cache(maxsize=4096)
def _jitted(kind: str, decode: Decode | None, maps: Maps) -> Any:
    return jax.jit(functools.partial(_run, kind, decode, maps))


_PRODUCT = Primitive("frugax_grouped_product")
_PRODUCT.def_abstract_eval(lambda *leaves, kind, decode, maps, out: out)
_PRODUCT.def_impl(lambda *leaves, kind, decode, maps, out: _function(kind, decode, maps)(*leaves))


def _lower(ctx, *leaves, kind, decode, maps, out):
    return mlir.lower_fun(_function(kind, decode, maps), multiple_results=False)(ctx, *leaves)


mlir.register_lowering(_PRODUCT, _lower)


def _jvp(primals, tangents, *, kind, decode, maps, out):
    x, sizes, *rest = primals
    of_x, of_y, experts = _split(maps, rest)
    dx, _, *drest = (t if isinstance(t, ad.Zero) else jnp.asarray(t) for t in tangents)
    dexperts = _split(maps, drest)[2]
    how: dict[str, Any] = {"of_x": of_x, "of_y": of_y, "rows": maps.rows}
    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(product(kind, dx, experts, sizes, decode, **how))
    if decode is None and not isinstance(dexperts[0], ad.Zero):
        terms.append(product(kind, x, dexperts, sizes, None, **how))
    y = product(kind, x, experts, sizes, decode, **how)
    return y, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(y)


def _transpose(dy, x, sizes, *rest, kind, decode, maps, out):
    of_x, of_y, experts = _split(maps, rest)
    nothing = (None,) * (2 + maps.x + maps.y)
    if isinstance(dy, ad.Zero):
        return *nothing, *(None,) * len(experts)
    how: dict[str, Any] = {"of_x": of_x, "of_y": of_y}
    if ad.is_undefined_primal(x):
        back = {"rows": "transposed", "transposed": "rows", "experts": "transposed"}[kind]
        given = (experts[0], (dy,)) if kind == "experts" else (dy, experts)
        how["rows"] = x.aval.shape[0] if (maps.y if kind == "transposed" else maps.x) else None
        found = _like(x, _narrow(back, *given, sizes, decode, **how))
        return found, *nothing[1:], *(None,) * len(experts)
    back = "rows" if kind == "experts" else "experts"
    if kind == "experts":
        how["rows"] = experts[0].aval.shape[0] if maps.y else None
    given = (dy, (x,)) if kind == "transposed" else (x, (dy,))
    return *nothing, _like(experts[0], _narrow(back, *given, sizes, None, **how))


def _narrow(
    kind: str, x: Array, experts: tuple[Array, ...], sizes: Array, decode: Decode | None, **how: Any
) -> Array:
    """The product with the cotangent in the other operand's dtype, which may be narrower."""
    if decode is None:
        dtype = min(x.dtype, experts[0].dtype, key=lambda dtype: dtype.itemsize)
        x, experts = x.astype(dtype), (experts[0].astype(dtype),)
    return product(kind, x, experts, sizes, decode, **how)


def _like(x: Any, gradient: Array) -> Array:
    return gradient.astype(x.aval.dtype)


def _batch(leaves, dims, **params):
    moved = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims, strict=True)]

    def one(mapped: list[Array]) -> Array:
        rest = iter(mapped)
        return _PRODUCT.bind(
            *(x if d is None else next(rest) for x, d in zip(moved, dims, strict=True)), **params
        )

    return lax.map(one, [x for x, d in zip(moved, dims, strict=True) if d is not None]), 0


ad.primitive_jvps[_PRODUCT] = _jvp
ad.primitive_transposes[_PRODUCT] = _transpose
batching.primitive_batchers[_PRODUCT] = _batch
