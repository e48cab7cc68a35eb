"""The three products of rows and experts as one JAX primitive: each has the other two as derivatives.

With rows x [M, K], y [M, N] in the order of experts W [E, K, N]:

    "rows"        (x, W) -> [M, N]     x_i W_e(i)
    "transposed"  (y, W) -> [M, K]     y_i W_e(i)^T
    "experts"     (x, y) -> [E, K, N]  sum of x_i y_i^T over the rows of each expert

Loops with as many steps as there are tiles can't be differentiated in reverse; and of a `scan` JAX would add
up the gradient of all experts at every step.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from . import tiles

Decode = Callable[..., Array]  # (expert's number, *stored arrays) -> [K, N]


def product(kind: str, x: Array, experts: tuple[Array, ...], sizes: Array, decode: Decode | None) -> Array:
    """The product, in float32 at least; differentiable in x and in float experts, any number of times.

    Args:
      kind: "rows", "transposed" or "experts".
      x: rows.
      experts: W; or the stored arrays of packed experts, which are constants; or y.
      sizes: int32 [E].
      decode: makes one expert of the stored arrays. Hashable. None: they are W.
    """
    traced = _jitted(kind, decode).trace(x, sizes, *experts)
    return _PRODUCT.bind(x, sizes, *experts, kind=kind, decode=decode, out=traced.jaxpr.out_avals[0])


def _run(kind: str, decode: Decode | None, x: Array, sizes: Array, *experts: Array) -> Array:
    if kind == "experts":
        (y,) = experts
        return tiles.by_groups(x, y, sizes)

    def matrix(e: Array) -> Array:
        w = decode(e, *experts) if decode else lax.dynamic_index_in_dim(*experts, e, keepdims=False)
        return w if kind == "rows" else w.T

    return tiles.by_rows(x, matrix, sizes, jax.eval_shape(matrix, sizes[0]).shape[1])


@functools.lru_cache(maxsize=4096)
def _jitted(kind: str, decode: Decode | None) -> Any:
    return jax.jit(functools.partial(_run, kind, decode))


_PRODUCT = Primitive("frugax_grouped_product")
_PRODUCT.def_abstract_eval(lambda *leaves, kind, decode, out: out)
_PRODUCT.def_impl(lambda *leaves, kind, decode, out: _jitted(kind, decode)(*leaves))


def _lower(ctx, *leaves, kind, decode, out):
    return mlir.lower_fun(_jitted(kind, decode), multiple_results=False)(ctx, *leaves)


mlir.register_lowering(_PRODUCT, _lower)


def _jvp(primals, tangents, *, kind, decode, out):
    x, sizes, *experts = primals
    dx, _, *dexperts = (t if isinstance(t, ad.Zero) else jnp.asarray(t) for t in tangents)
    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(product(kind, dx, tuple(experts), sizes, decode))
    if decode is None and not isinstance(dexperts[0], ad.Zero):
        terms.append(product(kind, x, tuple(dexperts), sizes, None))
    y = product(kind, x, tuple(experts), sizes, decode)
    return y, functools.reduce(jnp.add, terms) if terms else ad.Zero.from_primal_value(y)


def _transpose(dy, x, sizes, *experts, kind, decode, out):
    if isinstance(dy, ad.Zero):
        return (None,) * (2 + len(experts))
    if ad.is_undefined_primal(x):
        back = {"rows": "transposed", "transposed": "rows", "experts": "transposed"}[kind]
        given = (experts[0], (dy,)) if kind == "experts" else (dy, tuple(experts))
        return (_like(x, _narrow(back, *given, sizes, decode)), None, *(None,) * len(experts))
    back = "rows" if kind == "experts" else "experts"
    given = (dy, (x,)) if kind == "transposed" else (x, (dy,))
    return None, None, _like(experts[0], _narrow(back, *given, sizes, None))


def _narrow(kind: str, x: Array, experts: tuple[Array, ...], sizes: Array, decode: Decode | None) -> Array:
    """The product with the cotangent in the other operand's dtype, which may be narrower."""
    if decode is None:
        dtype = min(x.dtype, experts[0].dtype, key=lambda dtype: dtype.itemsize)
        x, experts = x.astype(dtype), (experts[0].astype(dtype),)
    return product(kind, x, experts, sizes, decode)


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
