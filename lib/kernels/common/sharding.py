"""Run an opaque function (a Pallas kernel) on every shard of its arguments, however the caller shards them.

XLA can't split a kernel by itself. What splits is said once, as the axes of every array: "b t h k" with b and
h independent. Explicit mesh axes are read from the arrays' types; inside a caller's `shard_map` or `pmap` the
function runs as it is. For automatic axes XLA's partitioner says how arrays lie (custom partitioning), except
on TPU, whose compiler has no such hook: there each splits batch if it can, else heads; those named like
`HEAD_MESH_AXES` heads before batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from . import compat
from .splits import MeshAxes, as_axes, choose, divides, shardy_rule, sizes_of, specs_of, sum_shards

HEAD_MESH_AXES = ("model", "mdl", "tensor", "tp", "mp", "heads")


class AxisNames(NamedTuple):
    """The axes of an operation's arrays: pytrees of strings, shaped like its arguments and its results."""

    arguments: tuple[Any, ...]
    results: Any


def per_shard(
    fn: Callable[..., Any],
    axes: AxisNames,
    independent: Sequence[str] = ("b", "h"),
    *,
    opaque: bool = True,
    partitioner: bool = True,
) -> Callable[..., Any]:
    """`fn`, run per shard over the axes in `independent`; every other axis is whole in each shard.

    Args:
      fn: a function of pytrees of arrays that gives the right answer for any slice along an independent axis.
        A result that lacks an independent axis, which some argument has, is a sum over it: shards add up.
      axes: one string per array, such as "b t h k"; a pytree of them for the arguments and for the results.
        An independent axis may have several sizes, such as 8 query heads and 2 key heads: each of the smaller
        is then shared by neighbouring shards where there are more shards than heads.
      independent: the axes that may be split.
      opaque: False for a function that XLA can partition: then only explicit mesh axes are handled here.
      partitioner: whether the compiler can ask how to split (custom partitioning); TPU's can't.

    Returns:
      A function of the same arguments, for use under `jit`, `vmap`, `scan`, `shard_map`; not differentiable
      when `opaque` (wrap it by `jax.custom_vjp`).
    """

    def call(*args):
        leaves, treedef = jax.tree.flatten(args)
        names, names_treedef = jax.tree.flatten(axes.arguments)
        if names_treedef != treedef:
            raise TypeError(f"axes: got {axes.arguments}; expected one string for each array of {treedef}")
        result_names, result_treedef = jax.tree.flatten(axes.results)

        def flat(*xs):
            results, got = jax.tree.flatten(fn(*treedef.unflatten(xs)))
            if got != result_treedef:
                raise TypeError(
                    f"axes: got results {axes.results}; expected one string for each array of {got}"
                )
            return results

        names = tuple(tuple(x.split()) for x in names)
        result_names = tuple(tuple(x.split()) for x in result_names)
        placed = _place(flat, names, result_names, tuple(independent), opaque, partitioner, leaves)
        return result_treedef.unflatten(placed)

    return call


def align(args: Any, names: Any, independent: Sequence[str] = ("b", "h")) -> Any:
    """Lay arguments out as `per_shard` will want them, where types say how they lie; the same numbers.

    Apply it before a `custom_vjp`, whose gradients must have the types of its arguments: explicit mesh axes
    that can't stay split are gathered here, and an argument that is the same on every shard of a caller's
    `shard_map` becomes one that varies, so that its gradient is summed.
    """
    leaves = jax.tree.leaves(args)
    mesh = _mesh_of(leaves)
    if mesh is None:
        return args
    if AxisType.Explicit in mesh.axis_types:
        rows = [tuple(x.split()) for x in jax.tree.leaves(names)]
        split = _split_by_types(rows, leaves, independent, mesh)
        specs = specs_of(rows, [x.shape for x in leaves], split, mesh.shape)
        leaves = [_reshard(x, spec, mesh) for x, spec in zip(leaves, specs, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(args), [vary_like(x, leaves) for x in leaves])


def vary_like(x: Array, tree: Any) -> Array:
    """`x`, such as zeros that start a scan, typed as varying over all that the arrays of `tree` vary over."""
    return compat.vary(x, frozenset().union(*(compat.varying_axes(y) for y in jax.tree.leaves(tree))))


def _place(fn, names, result_names, independent, opaque, partitioner, args) -> list[Array]:
    """Pick the way to split by the kind of mesh axes around the call."""
    mesh = _mesh_of(args)
    kinds = _kinds(mesh) if mesh is not None else {}
    free = _free(kinds)
    manual = len(free) < len(kinds)
    if AxisType.Explicit in kinds.values() and (opaque or not manual):
        return _in_shard_map(fn, names, result_names, independent, opaque, mesh, args)
    if not opaque:
        return fn(*args)
    if manual or not partitioner:
        if math.prod(mesh.shape[a] for a in free) > 1:  # kernels need every axis to be manual
            return _in_shard_map(fn, names, result_names, independent, opaque, mesh, args)
        return _as_it_is(fn, args) if manual else fn(*args)
    return _batchable(fn, names, result_names, independent)(*args)


def _mesh_of(args) -> AbstractMesh | None:
    """The mesh of the arguments' types, or the one in context."""
    meshes = [*(jax.typeof(x).sharding.mesh for x in args), jax.sharding.get_abstract_mesh()]
    return next((m for m in meshes if not m.empty), None)


def _as_it_is(fn, args) -> list[Array]:
    """Inside a caller's `shard_map`; kernels are typed without the axes that values vary over."""
    with compat.untyped_manual_axes():
        results = fn(*map(_untyped, args))
    return [vary_like(x, args) for x in results]


def _untyped(x: Array) -> Array:
    """`x` without the manual axes of its type, as any operation returns it where those are not tracked."""
    return jax.lax.squeeze(x[None], (0,))


def _in_shard_map(fn, names, result_names, independent, opaque, mesh, args) -> list[Array]:
    """Split over every mesh axis that a caller's `shard_map` has not split already."""
    split = _split_by_types(names, args, independent, mesh)
    in_specs = tuple(specs_of(names, [x.shape for x in args], split, mesh.shape))
    with compat.untyped_manual_axes():
        results = jax.eval_shape(fn, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))
    out_specs = specs_of(result_names, [x.shape for x in results], split, mesh.shape)
    if AxisType.Explicit in mesh.axis_types:
        args = [_reshard(x, spec, mesh) for x, spec in zip(args, in_specs, strict=True)]

    def shard(*xs):
        xs = [_untyped(x) if opaque else vary_like(x, xs) for x in xs]
        return sum_shards(fn(*xs), out_specs, split)

    placed = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(_free(_kinds(mesh))),
        check_vma=not opaque,  # types save sums over shards where XLA differentiates; kernels have none
    )
    return [vary_like(x, args) for x in placed(*args)]


def _kinds(mesh: AbstractMesh) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _free(kinds: dict[str, AxisType]) -> list[str]:
    """The axes that no caller's `shard_map` has split already."""
    return [axis for axis, kind in kinds.items() if kind is not AxisType.Manual]


def _split_by_types(names, args, independent, mesh) -> dict[str, MeshAxes]:
    """Explicit axes split what types say; automatic ones, not in types, the first they divide."""
    sizes = sizes_of(names, [x.shape for x in args], independent)
    split = choose(names, args, [jax.typeof(x).sharding.spec for x in args], sizes, mesh.shape)
    kinds = _kinds(mesh)
    for axis in _free(kinds):
        if kinds[axis] is AxisType.Auto:
            order = independent[::-1] if axis in HEAD_MESH_AXES else independent
            fits = (f for f in order if divides((*split[f], axis), sizes[f], mesh.shape))
            factor = next(fits, None)
            if factor is not None:
                split[factor] += (axis,)
    return split


def _reshard(x: Array, spec: PartitionSpec, mesh: AbstractMesh) -> Array:
    """Move `x` to `spec` as far as it names explicit axes; the rest is XLA's work."""
    explicit = {axis for axis, kind in _kinds(mesh).items() if kind is AxisType.Explicit}
    kept = [tuple(a for a in as_axes(entry) if a in explicit) for entry in spec]
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*kept)))


def _batchable(fn, names, result_names, independent):
    """Custom partitioning has no rule for `vmap`: a mapped axis becomes an independent axis in front."""

    @custom_vmap
    def call(*args):
        return _partitioned(fn, names, result_names, independent)(*args)

    @call.def_vmap
    def _(axis_size, mapped, *args):
        new = f"vmap{len(independent)}"
        rows = [(new, *x) if m else x for x, m in zip(names, mapped, strict=True)]
        batched = jax.vmap(fn, in_axes=tuple(0 if m else None for m in mapped))
        results = _batchable(batched, rows, [(new, *x) for x in result_names], (new, *independent))(*args)
        return results, [True] * len(results)

    def partitioned(*args):
        outside_jit = not any(isinstance(x, jax.core.Tracer) for x in args)
        return (jax.jit(call) if outside_jit else call)(*args)

    return partitioned


def _partitioned(fn, names, result_names, independent):
    """`fn` with rules for XLA's partitioner, which tells how arguments arrive and gathers the rest."""

    def decide(mesh, arrays):
        mesh = _by_primes(mesh, arrays[0].sharding)
        specs = [compat.partition_spec(x.sharding, mesh) for x in arrays]
        sizes = sizes_of(names, [x.shape for x in arrays[: len(names)]], independent)
        return mesh, choose([*names, *result_names], arrays, specs, sizes, mesh.shape)

    def place(mesh, rows, arrays, split):
        specs = specs_of(rows, [x.shape for x in arrays], split, mesh.shape)
        return tuple(NamedSharding(mesh, spec) for spec in specs)

    def partition(mesh, args, results):
        mesh, split = decide(mesh, [*args, *results])
        placed = place(mesh, result_names, results, split)
        lower = lambda *xs: tuple(sum_shards(fn(*xs), [p.spec for p in placed], split))  # noqa: E731
        return mesh, lower, placed, place(mesh, names, args, split)

    def infer(mesh, args, results):  # only for the partitioner that Shardy replaces
        mesh, split = decide(mesh, args)
        return place(mesh, result_names, results, split)

    def rule(mesh, argument_types, result_types):
        shapes = [tuple(t.shape) for t in (*argument_types, *result_types)]
        return shardy_rule(names, result_names, shapes, independent)

    @custom_partitioning
    def call(*args):
        return tuple(fn(*args))

    call.def_partition(
        partition=partition, infer_sharding_from_operands=infer, sharding_rule=rule, decode_shardings=False
    )
    return lambda *args: list(call(*args))


def _by_primes(mesh: Mesh, sharding) -> Mesh:
    """The same devices, every axis cut into prime ones: the partitioner may split 2 heads over half of 4."""
    if mesh.empty:
        devices = np.array(sharding._device_assignment)
        shape = {"d": devices.size}
    else:
        devices, shape = mesh.devices, mesh.shape
    cut = [(f"{axis}_{i}", prime) for axis, n in shape.items() for i, prime in enumerate(_primes(n))]
    return Mesh(devices.reshape([n for _, n in cut]), [axis for axis, _ in cut])


def _primes(n: int) -> list[int]:
    prime = next((p for p in range(2, n + 1) if n % p == 0), None)
    return [] if prime is None else [prime, *_primes(n // prime)]
