"""NaN and infinity kept inside their documents, for kernels whose products mix the tokens of a chunk.

Such a product weighs tokens of other documents by zero, and zero times NaN is NaN. So what isn't finite is
zero in the kernel, and all that it reaches is NaN outside: later outputs of its document and, if that is the
row's last, the state. Backward likewise: a cotangent that isn't finite is zero in the kernel, and gradients
of its document are NaN. What overflows in the kernel, from finite numbers, is not kept apart.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def isolated(
    run: Callable[[Any], Any],
    call: Any,
    names: Any,
    result_names: Any,
    *,
    index: Array,
    gates: Collection[str] = (),
) -> Any:
    """`run(call)` of packed rows, where nothing that isn't finite gets from one document to another.

    Args:
      run: a differentiable function of the call.
      call: a NamedTuple of arrays or None.
      names: the axes of each array in the call: "b t" come first. One without "t" belongs to a row's first
        document, and one without "b" to all documents.
      result_names: the axes of each result. One without "t" belongs to a row's last document.
      index: the number of each token's document in its row, int32 [B, T].
      gates: the arrays of the call in which minus infinity is a value like others.
    """
    floats = {n: x for n, x in call._asdict().items() if x is not None and _is_float(x)}
    axes = {n: getattr(names, n).split() for n in floats}
    bad_BT = jnp.zeros_like(index, bool)
    clean, marks_BT = {}, jnp.zeros_like(index, jnp.float32)
    for n, x in floats.items():
        if "b" in axes[n]:
            finite = jnp.isfinite(x) | (x == -jnp.inf) if n in gates else jnp.isfinite(x)
            bad_BT = _add(bad_BT, ~finite, axes[n], place=0)
            x = jnp.where(finite, x, 0)
        clean[n], marks = _entering(x, axes[n], index)
        marks_BT = marks_BT + marks
    reached_BT = _reached(bad_BT, index)
    results = run(call._replace(**clean))
    return jax.tree.map(lambda y, n: _leaving(y, n.split(), marks_BT, reached_BT), results, result_names)


def _entering(x: Array, axes: list[str], index: Array) -> tuple[Array, Array]:
    """x, and zeros [B, T] whose cotangent marks the tokens of which x's own cotangent is to be NaN."""

    def transposed(cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
        x, marks_BT = cotangents
        return _spoil(x, _document_of(marks_BT > 0, index), axes, place=0), jnp.zeros_like(marks_BT)

    return _identity(x, jnp.zeros_like(index, jnp.float32), transposed)


def _leaving(y: Array, axes: list[str], marks_BT: Array, reached_BT: Array) -> Array:
    """A result, NaN where it was reached; in its cotangent what isn't finite is left out, and marked."""

    def transposed(cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
        y, _ = cotangents
        finite = jnp.isfinite(y)
        # The gradient of a NaN is unknown, but for one that was not used.
        lost = ~finite | (y != 0) & _over(reached_BT, y, axes, place=-1)
        marked_BT = _add(jnp.zeros_like(reached_BT), lost, axes, place=-1)
        return jnp.where(finite, y, 0), marked_BT.astype(jnp.float32)

    return _identity(_spoil(y, reached_BT, axes, place=-1), marks_BT, transposed)[0]


def _identity(x: Array, y: Array, transposed: Callable[[Any], Any]) -> tuple[Array, Array]:
    """x and y, with cotangents that pass through `transposed`; derivatives of any order, in either mode."""
    both = lax.custom_linear_solve(lambda x: x, _tied(x, y), lambda _, x: x, lambda _, x: transposed(x))
    return _tied(*both)


def _tied(x: Array, y: Array) -> tuple[Array, Array]:
    """x and y, zeros as the derivative of one where the other alone has any: a solve wants both or none."""
    return jnp.where(False, jnp.sum(y).astype(x.dtype), x), jnp.where(False, jnp.sum(x).astype(y.dtype), y)


def _add(bad_BT: Array, x: Array, axes: list[str], place: int) -> Array:
    """`bad_BT`, or anything of x at the token; x without time counts at token `place`."""
    if "t" in axes:
        return bad_BT | jnp.any(x, axis=tuple(range(2, x.ndim)))
    # Not by a scatter, which a sharded batch would have to be told how to place.
    at = lax.broadcasted_iota(jnp.int32, bad_BT.shape, 1) == place % bad_BT.shape[1]
    return bad_BT | at & jnp.any(x, axis=tuple(range(1, x.ndim)))[:, None]


def _over(mask_BT: Array, x: Array, axes: list[str], place: int) -> Array:
    """The mask in x's axes: of each token, of the token `place`, or of any."""
    if "b" not in axes:
        return jnp.any(mask_BT)
    mask = mask_BT if "t" in axes else mask_BT[:, place]
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def _spoil(x: Array, mask_BT: Array, axes: list[str], place: int) -> Array:
    return jnp.where(_over(mask_BT, x, axes, place), jnp.nan, x)


def _reached(bad_BT: Array, index: Array) -> Array:
    """The tokens [B, T] that are bad, or come after one that is in their document."""
    t = lax.broadcasted_iota(jnp.int32, index.shape, 1)
    starts = jnp.pad(index[:, 1:] != index[:, :-1], ((0, 0), (1, 0)))
    return lax.cummax(jnp.where(bad_BT, t, -1), axis=1) >= lax.cummax(jnp.where(starts, t, 0), axis=1)


def _document_of(bad_BT: Array, index: Array) -> Array:
    """The tokens [B, T] of documents that have a bad one."""
    after = jnp.flip(_reached(jnp.flip(bad_BT, 1), jnp.flip(index, 1)), 1)
    return _reached(bad_BT, index) | after


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
