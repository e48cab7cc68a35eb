"""Shardings of params and of an optimizer's state, from rules that place logical axes on a mesh's axes."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ..formats import QuantizedTensor
from .axes import axes_of

Rules = Mapping[str, str | tuple[str, ...] | None]

# Megatron's tensor parallelism: a first matrix by its columns, a second by its rows, one sum over devices.
RULES: Rules = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "layers": "pipeline",
    "embed": None,
}
SMALLEST = 4096  # numbers: an array below is on every device, since gathering it costs more than it saves


def shardings(params: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES, *, zero: bool = True) -> Any:
    """Place params on a mesh.

    Args:
      params: arrays or shapes.
      mesh: from `make_mesh`, or a `jax.sharding.AbstractMesh` with its axes.
      rules: for each logical axis (see `logical_axes`) the mesh axis, or axes, that share it; None: none.
      zero: also spread each array over the mesh axes "fsdp" and "sequence", whose devices would all have the
        same, along a dimension that divides: a free one, else one that a rule has split already, and the last
        one only where there is no other, since a group of codes runs along it. That is stage 3 of ZeRO for
        params, stage 2 for gradients, stage 1 for an optimizer's state.

    Returns:
      A NamedSharding for each leaf.

    Raises:
      ValueError: an array's dimension is not a multiple of what its rule says; the message names both.

    Source: Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053); Rajbhandari et al. 2020, ZeRO (1910.02054).

    Example:
        >>> import jax, jax.numpy as jnp, frugax
        >>> model = frugax.layers.Decoder(vocab_size=10, width=16, repeats=3)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
        >>> mesh = frugax.parallel.make_mesh()
        >>> placed = frugax.parallel.shardings(params, mesh)
        >>> tuple(placed["layers"]["block_0"]["channel"]["out"]["kernel"].spec)
        ('pipeline', 'tensor', None)
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _spec(_text(path), x.shape, mesh, rules, zero)), params
    )


def state_shardings(
    state: Any, params: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES, *, zero: bool = True
) -> Any:
    """Place an optimizer's state as the params that it belongs to: stage 1 of ZeRO, whatever params have.

    A moment in its param's shape is placed as the param. One in codes is too, but for the axis of its groups
    where a device would have a part of one. Others, such as projectors and moments in a subspace, share
    dimensions of the same size with the param; what is left goes over "fsdp" and "sequence" alone.

    Args:
      state: `optimizer.init(params)`, or its shapes. A leaf belongs to the param whose path is part of its.
      params, mesh, rules, zero: as in `shardings`.

    Returns:
      A NamedSharding for each leaf.

    Example:
        >>> import jax, jax.numpy as jnp, frugax, optax
        >>> params = {"embedding": jnp.zeros((256, 64))}
        >>> state = optax.adam(0.1).init(params)
        >>> mesh = frugax.parallel.make_mesh()
        >>> tuple(frugax.parallel.state_shardings(state, params, mesh)[0].mu["embedding"].spec)
        ('fsdp', None)
    """
    named = {
        _text(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)
    }  # longest first: "mixer/out/kernel" before "kernel"
    by_length = sorted(named, key=len, reverse=True)

    def place(path, x):
        found = f"/{_text(path)}/"
        owner = next((name for name in by_length if f"/{name}/" in found), None)
        if owner is None or not x.ndim:
            return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), x)
        shape = named[owner]
        spec = _spec(owner, shape, mesh, rules, zero)
        if isinstance(x, QuantizedTensor):
            spec = spec if x.shape == shape else _shared(spec, shape, x.shape, mesh, False)
            return _by_groups(x, spec, mesh, zero)
        if x.shape != shape:
            spec = _shared(spec, shape, x.shape, mesh, zero)
        return NamedSharding(mesh, spec)

    is_leaf = lambda x: isinstance(x, QuantizedTensor)  # noqa: E731
    return jax.tree_util.tree_map_with_path(place, state, is_leaf=is_leaf)


def table(params: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES, *, zero: bool = True) -> str:
    """Say in a line for each array its shape, logical axes and mesh axes, for a person to read.

    Example:
        >>> import jax.numpy as jnp, frugax
        >>> print(frugax.parallel.table({"embedding": jnp.zeros((256, 64))}, frugax.parallel.make_mesh()))
        embedding  256 x 64  vocab, embed  fsdp, -
    """
    rows = []
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = _text(path)
        axes, known = axes_of(name, x.ndim)
        spec = _spec(name, x.shape, mesh, rules, zero)
        meaning = ", ".join(axis or "-" for axis in axes) if known else "unknown"
        rows.append((name, " x ".join(map(str, x.shape)), meaning, ", ".join(_say(part) for part in spec)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: Rules, zero: bool
) -> PartitionSpec:
    axes, _ = axes_of(path, len(shape))
    parts: list[Any] = [None if axis is None else rules.get(axis) for axis in axes]
    for i, (size, axis, part) in enumerate(zip(shape, axes, parts, strict=True)):
        for name in _names(part):
            if name not in mesh.shape:
                raise ValueError(f"rules: got {axis!r}: {part!r}; expected axes of {tuple(mesh.shape)}")
        if size % _size(mesh, part):
            raise ValueError(
                f"mesh: {_say(part)} has {_size(mesh, part)} devices; expected a divisor of {size}, "
                f"dimension {i} ({axis}) of {path} {list(shape)}, or a rule {axis!r}: None"
            )
    if zero and math.prod(shape) >= SMALLEST:
        # Where two axes split one side of an expert's matrix, XLA's partitioner ends a process whose program
        # has a manual axis, such as a pipeline's (jax 0.10.2).
        split = [i for i, part in enumerate(parts) if "experts" in axes and _size(mesh, part) > 1]
        open_to = [i for i, axis in enumerate(axes) if axis not in ("layers", "experts") and i not in split]
        _spread(parts, shape, open_to, mesh)
    return PartitionSpec(*parts)


def _shared(spec, shape, own, mesh: Mesh | AbstractMesh, zero: bool) -> PartitionSpec:
    """Place an array beside another: dimensions of one size, in their order, are placed alike."""
    parts: list[Any] = [None] * len(own)
    at = 0
    for i, size in enumerate(own):
        found = next((j for j in range(at, len(shape)) if shape[j] == size), None)
        if found is not None:
            parts[i], at = spec[found], found + 1
    if zero and math.prod(own) >= SMALLEST:
        first = 1 if own[0] == shape[0] and len(shape) > 2 else 0  # not over the layers of a stack
        _spread(parts, own, [i for i in range(first, len(own)) if parts[i] is None], mesh)
    return PartitionSpec(*parts)


def _by_groups(x: Any, spec: PartitionSpec, mesh: Mesh | AbstractMesh, zero: bool) -> Any:
    """Place codes as `spec` says, but no group of them on several devices, and what a group has beside it."""
    axis = x.axis % x.ndim
    parts: list[Any] = [*spec, *(None,) * (x.ndim - len(spec))]
    if x.shape[axis] % (_size(mesh, parts[axis]) * x.group_size):
        # Over as many devices as can have whole groups, and over "fsdp" first: gradients come over it.
        names = [name for name in _names(parts[axis]) if mesh.shape[name] > 1]
        some = [part for n in range(1, len(names)) for part in itertools.combinations(names, n)]
        some.sort(key=lambda part: (-_size(mesh, part), "fsdp" not in part))
        fitting = (part for part in some if x.shape[axis] % (_size(mesh, part) * x.group_size) == 0)
        parts[axis] = next(fitting, None)
    if zero and x.size >= SMALLEST:
        first = 1 if x.ndim > 2 else 0  # not over the layers of a stack
        open_to = [i for i in range(first, x.ndim) if parts[i] is None and i != axis]
        _spread(parts, x.shape, open_to, mesh)

    def beside(own):
        fits = [own.shape[i] % _size(mesh, part) == 0 for i, part in enumerate(parts)]
        return NamedSharding(
            mesh, PartitionSpec(*(part if fit else None for part, fit in zip(parts, fits, strict=True)))
        )

    return jax.tree.map(beside, x)


def _spread(
    parts: list[Any], shape: tuple[int, ...], dimensions: list[int], mesh: Mesh | AbstractMesh
) -> None:
    used = {name for part in parts for name in _names(part)}
    if "fsdp" in used:
        return
    # The last dimension last: its numbers lie side by side, in a chip's registers and in groups of codes.
    order = sorted(dimensions, key=lambda i: (i == len(shape) - 1, _size(mesh, parts[i]) > 1, -shape[i]))
    both = ("fsdp", "sequence")
    with_time = mesh.shape.get("sequence", 1) > 1 and "sequence" not in used
    for over in (both, both[:1]) if with_time else (both[:1],):
        for i in order:
            beside = (*(name for name in _names(parts[i]) if mesh.shape[name] > 1), *over)
            if shape[i] % _size(mesh, beside) == 0:
                parts[i] = beside if len(beside) > 1 else beside[0]
                return


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _size(mesh: Mesh | AbstractMesh, part: Any) -> int:
    return math.prod(mesh.shape[name] for name in _names(part))


def _say(part: Any) -> str:
    return "*".join(_names(part)) or "-"


def _text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
