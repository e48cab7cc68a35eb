"""Any Optax transformation with its state quantized between steps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ...formats import Format, QuantizedTensor, above_zero, format_named, quantize
from ..common.chains import static_size
from ..common.containers import without_variables

# What Optax calls second moments in its states.
SECOND_MOMENTS = ("nu", "nu_max", "v_row", "v_col", "exp_avg_sq", "sum_of_squares")

# One program where `init` runs outside of jit, instead of one for each of a hundred operations.
_quantize = jax.jit(quantize, static_argnames=("format", "axis", "group_size"))


def quantized_state(
    inner: optax.GradientTransformation,
    format: Format | str | Mapping[str, Format | str],
    *,
    group_size: int = 256,
    min_size: int = 4096,
    chunks: int = 1,
) -> optax.GradientTransformation:
    """`inner` with its large arrays stored as codes: dequantized for each update, and quantized again.

    Args:
      inner: any transformation or chain. For Adam, Lion and momentum `scale_by_adam_8bit` and its siblings
        are faster.
      format: of every moment; or a mapping from the name of a field of the state to a format, such as
        {"mu": "dynamic8", "nu": "udynamic8"}: fields without a name in it stay as they are. Second moments
        need "ufp8_e4m4" or "udynamic8" (they become "udynamic8_positive"): others have too large a zero.
      group_size: elements that share a scale, along the last axis.
      min_size: arrays with fewer elements stay as they are, as do integers and scalars.
      chunks: above 1 for an `inner` that is elementwise (what becomes of a number depends on that number's
        gradient, state and parameter, and on scalars): leaves are then worked through in that many parts
        along the longest axis but the last, so that a step needs float32 copies of one part, where otherwise
        it needs them of everything. On a mesh, leave 1 if that axis is sharded: its parts would be gathered.

    Returns:
      A transformation whose state is `inner`'s with a `QuantizedTensor` in place of each such array.

    Raises:
      ValueError: a name in `format` matches no field of the state, or a format is none for second moments;
        `chunks` for an inner whose state has arrays of other shapes than the leaves.

    Source: Dettmers et al. 2022 (arXiv 2110.02861).

    Example:
        >>> import frugax, optax, jax.numpy as jnp
        >>> formats = {"mu": "int8", "nu": "udynamic8"}
        >>> tx = frugax.optim.quantized_state(optax.scale_by_adam(), formats, chunks=8)
        >>> state = tx.init({"w": jnp.zeros((64, 256))})
        >>> state.mu["w"].format.name, state.nu["w"].nbytes
        ('int8', 16640)
    """
    inner, parts = optax.with_extra_args_support(inner), static_size("chunks", chunks)

    def init(params):
        state = inner.init(params)
        _check_names(state, format)

        def store(path, x):
            chosen = _format_at(path, format)[1]
            if (
                chosen is None
                or not jnp.issubdtype(x.dtype, jnp.floating)
                or x.ndim == 0
                or x.size < min_size
            ):
                return x
            if is_second_moment(path):
                chosen = above_zero(chosen)
            return _quantize(x, chosen, axis=-1, group_size=group_size)

        return jax.tree_util.tree_map_with_path(store, state)

    def update(updates, state, params=None, **extra_args):
        def step(updates, state, params):
            results, new = inner.update(updates, _map(_whole, state), params, **extra_args)
            # Dequantized moments are float32 whatever the gradient is.
            results = jax.tree.map(lambda x, g: x.astype(g.dtype), results, updates)
            return results, _map(_stored, state, new)

        if parts == 1:
            return step(updates, state, params)
        _check_elementwise(updates, state)
        return _in_parts(step, parts, updates, state, params)

    return without_variables(optax.GradientTransformationExtraArgs(init, update))


def is_second_moment(path: tuple[Any, ...]) -> bool:
    """Test if a path in an optimizer's state leads through a field by a name of second moments."""
    fields = (key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey))
    return any(name in SECOND_MOMENTS for name in fields)


def _in_parts(step: Callable[..., Any], parts: int, updates: Any, state: Any, params: Any) -> Any:
    """`step`, a part of every leaf at a time, in place; what doesn't divide by the parts comes at the end."""

    def visit(updates, state, cut):
        new_updates, new_state = step(_map(cut, updates), _map(cut, state), _map(cut, params))
        return new_updates, new_state

    def turn(i, arrays):
        new = visit(*arrays, lambda x: _cut(x, i * _rows(x, parts), _rows(x, parts)))
        # Scalars stay as they were: each part is of the same step.
        return jax.tree.map(
            lambda x, y: _put(x, y, i * _rows(x, parts), parts), arrays, new, is_leaf=_is_codes
        )

    updates, state = lax.fori_loop(0, parts, turn, (updates, state))
    last = visit(updates, state, lambda x: _cut(x, parts * _rows(x, parts), None))
    return jax.tree.map(
        lambda x, y: y if x.ndim == 0 else _put(x, y, parts * _rows(x, parts), parts),
        (updates, state),
        last,
        is_leaf=_is_codes,
    )


def _axis(x: Any) -> int:
    """The longest axis but the last, along which groups run; of a vector, its only one."""
    sides = x.shape[:-1]
    return sides.index(max(sides)) if sides else 0


def _rows(x: Any, parts: int) -> int:
    """The number of rows of that axis in a part. A vector is left for the end."""
    return x.shape[_axis(x)] // parts if x.ndim > 1 else 0


def _cut(x: Any, start: Any, rows: int | None) -> Any:
    """Rows of an array, or of codes and scales alike; a scalar as it is. None: all from `start` on."""
    if x.ndim == 0:
        return x
    axis = _axis(x)
    rows = x.shape[axis] - start if rows is None else rows
    if _is_codes(x) and rows == 0:
        return jnp.zeros((*x.shape[:axis], 0, *x.shape[axis + 1 :]), jnp.float32)
    if _is_codes(x) and x.ndim == 1:
        return x
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, rows, axis), x)


def _put(x: Any, part: Any, start: Any, parts: int) -> Any:
    """`x` with rows from `start` on replaced."""
    if x.ndim == 0 or 0 in part.shape:
        return x
    if _is_codes(x) and x.ndim == 1:
        return part
    axis = _axis(x)
    return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, start, axis), x, part)


def _is_codes(x: Any) -> bool:
    return isinstance(x, QuantizedTensor)


def _map(f: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(f, *trees, is_leaf=_is_codes)


def _whole(x: Any) -> Any:
    return x.dequantize() if _is_codes(x) else x


def _stored(old: Any, x: Any) -> Any:
    """`x`, in codes if the old state was."""
    return quantize(x, old.format, axis=old.axis, group_size=old.group_size) if _is_codes(old) else x


def _check_elementwise(updates: Any, state: Any) -> None:
    shapes = {x.shape for x in jax.tree.leaves(updates)}
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_codes):
        if x.ndim and x.shape not in shapes:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"chunks: inner's state has {list(x.shape)} at {name}, which is no leaf's shape; "
                "expected an elementwise transformation, or chunks=1"
            )


def _check_names(state: Any, format: Any) -> None:
    """Raise ValueError where a mapping has a name that no field has, be it a field without an array."""
    is_empty = lambda x: not jax.tree.leaves(x)  # noqa: E731
    fields = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_empty)
    unknown = set(format if isinstance(format, Mapping) else ()) - {
        _format_at(p, format)[0] for p, _ in fields
    }
    if unknown:
        raise ValueError(f"format: got {', '.join(sorted(unknown))}; expected names of fields of the state")


def _format_at(path: tuple[Any, ...], format) -> tuple[str | None, Format | None]:
    """The name in a mapping that a path has, and its format."""
    if not isinstance(format, Mapping):
        return None, format_named(format)
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    found = next((name for name in names if name in format), None)
    return found, None if found is None else format_named(format[found])
