"""Operations as layers call them: those of `frugax.kernels`, with time split as the mesh in context says.

Under `jax.set_mesh` with an automatic axis "sequence" above 1 each runs in a `jax.shard_map` of its own. That
is manual over every axis, so that kernels see plain shards: rows over the batch's axes, heads or channels
over "tensor", time over "sequence". Between shards of time go states, or a few tokens. What a layer does
between its operations is of one token each, and XLA's to split. Without such an axis the kernel is called
itself; so it is inside a caller's `shard_map` over "sequence", where each shard is a sequence by itself.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from .. import kernels
from ..kernels.common.rows import rows as rows_of
from ..kernels.common.splits import divides, sizes_of, specs_of
from ..kernels.trapezoidal_ssd import TrapezoidalState
from . import sequence, state_spaces
from .mesh import BATCH_AXES

SEQUENCE = "sequence"
TENSOR = "tensor"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def time_shards() -> int:
    """Count the devices that share the time axis by the mesh in context; 1 where it is whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if SEQUENCE not in mesh.axis_names or SEQUENCE not in _automatic(mesh):
        return 1
    return mesh.shape[SEQUENCE]


def refuse_split_time(name: str, reason: str) -> None:
    """Raise ValueError where time is split, for what has no form of that kind.

    Args:
      name: the layer that can't.
      reason: why.
    """
    if time_shards() > 1:
        got = f"{name}: got time split over {time_shards()} devices of the mesh axis {SEQUENCE!r}"
        raise ValueError(f"{got}; expected whole rows: {reason}")


def check_whole_rows(**given: Any) -> None:
    """Raise ValueError where time is split and an argument is given that shards of rows can't have."""
    for name, value in given.items():
        if value is not None and value is not False and time_shards() > 1:
            raise ValueError(
                f"{name}: got {_said(value)} with time split over the mesh axis {SEQUENCE!r}; expected none"
            )


def over_time(
    fn: Callable[..., Any], arguments: Mapping[str, Any], results: Any, *, heads: str = "h"
) -> Callable[..., Any]:
    """Run a function of shards of time over the mesh in context.

    Args:
      fn: of arrays by name, inside a `shard_map` with the manual axis "sequence". What it returns without
        time is the same on every shard of time.
      arguments: the axes of each array by name, such as "b t h k", or of a tree of arrays: rows "b" go over
        the axes of the batch, time "t" over "sequence", `heads` over "tensor", as far as those divide; others
        are whole.
      results: the axes of each result, a tree of strings.
      heads: the axis that "tensor" splits.

    Returns:
      A function of the arrays by name.

    Raises:
      ValueError: (from that) the devices don't divide the tokens.
    """

    def call(**arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        free = _automatic(mesh)
        leaves, structure = jax.tree.flatten(arrays)
        rows = [tuple(axes.split()) for axes in jax.tree.leaves({name: arguments[name] for name in arrays})]
        shapes = [x.shape for x in leaves]
        sizes = sizes_of(rows, shapes, ("b", heads, "t"))
        named = jax.tree_util.tree_leaves_with_path(arrays)
        for (path, x), row in zip(named, rows, strict=True):
            tokens = x.shape[row.index("t")] if "t" in row else 0
            if tokens % mesh.shape[SEQUENCE]:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(_too_few(name, tokens, mesh.shape[SEQUENCE]))
        batch = _that_divide(max(sizes["b"]), mesh)
        tensor = (TENSOR,) if TENSOR in free and divides((TENSOR,), sizes[heads], mesh.shape) else ()
        split = {"b": batch, heads: tensor, "t": (SEQUENCE,)}
        names, tree = jax.tree.flatten(results)
        in_specs = jax.tree.unflatten(structure, specs_of(rows, shapes, split, mesh.shape))
        whole = {axis: max(size, default=1) for axis, size in sizes.items()}
        out_rows = [tuple(name.split()) for name in names]
        out_shapes = [tuple(whole.get(axis, 1) for axis in row) for row in out_rows]
        out_specs = jax.tree.unflatten(tree, specs_of(out_rows, out_shapes, split, mesh.shape))
        shard = lambda arrays: fn(**arrays)  # noqa: E731
        placed = jax.shard_map(
            shard, in_specs=(in_specs,), out_specs=out_specs, axis_names=set(free), check_vma=True
        )
        return placed(arrays)

    return call


def shards_as_rows(x: Array) -> Array:
    """x [B, T, ...] with each of P shards of time a row of its own, [B * P, T / P, ...], where it lies.

    For layers that treat all tokens alike. Rows come by the batch's devices, then by those of time.
    """
    shards = time_shards()
    if shards == 1:
        return x
    (B, T), batch = x.shape[:2], _batch_devices(x.shape[0])
    if T % shards:
        raise ValueError(_too_few("x", T, shards))
    x = x.reshape(batch, B // batch, shards, T // shards, *x.shape[2:])
    return jnp.swapaxes(x, 1, 2).reshape(B * shards, T // shards, *x.shape[4:])


def rows_as_shards(y: Array) -> Array:
    """The inverse of `shards_as_rows`."""
    shards = time_shards()
    if shards == 1:
        return y
    B, T = y.shape[0] // shards, y.shape[1]
    batch = _batch_devices(B)
    y = y.reshape(batch, shards, B // batch, T, *y.shape[2:])
    return jnp.swapaxes(y, 1, 2).reshape(B, shards * T, *y.shape[4:])


def token_axes(*others: str) -> tuple[str, ...]:
    """Name the axes of the mesh in context that split rows or time, and `others`, in the mesh's order."""
    mesh = jax.sharding.get_abstract_mesh()
    wanted = {*BATCH_AXES, *others, *((SEQUENCE,) if time_shards() > 1 else ())}
    return tuple(axis for axis in mesh.axis_names if axis in wanted)


def _batch_devices(rows: int) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    axes = _that_divide(rows, mesh)
    return math.prod(mesh.shape[axis] for axis in axes)


def _that_divide(rows: int, mesh: Any) -> tuple[str, ...]:
    """The axes of the batch, without the last ones as long as they don't divide the rows."""
    axes = tuple(axis for axis in BATCH_AXES if axis in _automatic(mesh))
    while rows % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def _too_few(name: str, tokens: int, shards: int) -> str:
    expected = f"a multiple of {shards}, the devices of the mesh axis {SEQUENCE!r}"
    return f"{name}: got {tokens} tokens; expected {expected}"


def _split(
    whole: Callable[_P, _R], shard: Callable[..., Any], arguments: dict[str, Any], results: Any, heads: str
) -> Callable[_P, _R]:
    """The kernel's own call, or `shard` on each shard of time."""
    signature = inspect.signature(whole)

    @functools.wraps(whole)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if time_shards() == 1:
            return whole(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        check_whole_rows(reverse=given.pop("reverse", None))
        of_rows = [given.pop(name, None) for name in ("lengths", "segment_states")]
        arrays = {name: given.pop(name) for name in arguments if given.get(name) is not None}
        axes = {name: _alternative(arguments[name], x) for name, x in arrays.items()}
        if None in axes.values():
            return whole(*args, **kwargs)  # which says what is wrong
        run = functools.partial(shard, axis_name=SEQUENCE, **given)
        of_tokens = [name for name, a in axes.items() if isinstance(a, str) and a.split()[1:2] == ["t"]]
        read = rows_of(arrays[of_tokens[0]].shape[:2], arrays.get("segment_ids"), *of_rows)
        if read is None:
            return over_time(run, axes, results, heads=heads)(**arrays)  # type: ignore[no-any-return]
        arrays |= {name: read.read(arrays[name]) for name in of_tokens if name != "segment_ids"}
        if read.ids is not None:
            arrays["segment_ids"] = read.ids
        of_y, of_state = results
        of_states = jax.tree.map(lambda of_one: of_one.replace("b", "b places", 1), of_state)
        apart = over_time(run, axes | {"places": "b places"}, (of_y, of_states), heads=heads)
        found = []

        def states_at(places: Array) -> Any:
            y, states = apart(**arrays, places=places)
            found.append(y)
            return states

        state = read.states_by_place(None, states_at)
        return read.write(found[0]), state  # type: ignore[return-value]

    return call


def _alternative(axes: Any, x: Any) -> Any:
    """The axes that an array has, of those in its row of a table; a tree's are as they are."""
    if not isinstance(axes, str):
        return axes
    found = (one for one in axes.split("|") if len(one.split()) == getattr(x, "ndim", 0))
    return next(found, None)


def _automatic(mesh: Any) -> list[str]:
    """The axes that no caller's `shard_map` has split already, and types don't name."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [axis for axis, kind in kinds if kind is AxisType.Auto]


def _said(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)


linear_attention = _split(
    kernels.linear_attention,
    sequence.linear_attention,
    {
        "q": "b t h k",
        "k": "b t h k",
        "v": "b t h v",
        "log_decay": "h | b t h | b t h k",
        "bonus": "h k",
        "initial_state": "b h k v",
        "segment_ids": "b t",
    },
    ("b t h v", "b h k v"),
    "h",
)
linear_recurrence = _split(
    kernels.linear_recurrence,
    sequence.linear_recurrence,
    {"a": "b t d", "b": "b t d", "initial_state": "b d", "segment_ids": "b t"},
    ("b t d", "b d"),
    "d",
)
causal_conv1d = _split(
    kernels.causal_conv1d,
    sequence.causal_conv1d,
    {"x": "b t d", "weight": "w d", "bias": "d", "initial_state": "b w d", "segment_ids": "b t"},
    ("b t d", "b w d"),
    "d",
)
selective_scan = _split(
    kernels.selective_scan,
    state_spaces.selective_scan,
    {
        "x": "b t d",
        "dt": "b t d",
        "A": "d n",
        "B": "b t n",
        "C": "b t n",
        "D": "d",
        "z": "b t d",
        "dt_bias": "d",
        "initial_state": "b d n",
        "segment_ids": "b t",
    },
    ("b t d", "b d n"),
    "d",
)
ssd = _split(
    kernels.ssd,
    state_spaces.ssd,
    {
        "x": "b t h p",
        "dt": "b t h",
        "A": "h",
        "B": "b t h n",
        "C": "b t h n",
        "D": "h | h p",
        "z": "b t h p",
        "dt_bias": "h",
        "initial_state": "b h n p",
        "segment_ids": "b t",
    },
    ("b t h p", "b h n p"),
    "h",
)
trapezoidal_ssd = _split(
    kernels.trapezoidal_ssd,
    state_spaces.trapezoidal_ssd,
    {
        "x": "b t h p",
        "dt": "b t h",
        "A": "b t h",
        "B": "b t h n",
        "C": "b t h n",
        "mix": "b t h",
        "D": "h",
        "initial_state": TrapezoidalState("b h n p", "b h n", "b h p"),
        "segment_ids": "b t",
    },
    ("b t h p", TrapezoidalState("b h n p", "b h n", "b h p")),
    "h",
)
lmu = _split(
    kernels.lmu,
    state_spaces.lmu,
    {"u": "b t d", "initial_state": "b d n", "segment_ids": "b t"},
    ("b t d n", "b d n"),
    "d",
)
