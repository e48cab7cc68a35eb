"""Places of activations on a mesh: rows over the axes of a batch, time over "sequence"."""

import math
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from .mesh import AXES, BATCH_AXES


def place_activations(x: Array, *, inner: bool = False) -> Array:
    """Tell the compiler that activations [B, T, ...] lie by rows and time; the same numbers.

    The mesh is that of `jax.set_mesh`. Without this the compiler may leave activations where params lie: with
    those shared over "fsdp" it would split the channels over devices and sum each product, in place of
    gathering the params of a layer at a time. Without a mesh, or inside a `shard_map` of these axes, nothing
    happens. Axes that don't divide a size leave it whole.

    Args:
      x: batch first, then time.
      inner: the last axis is of inner channels, which "tensor" may share: the compiler may split it.

    Source: Xu et al. 2021, GSPMD (arXiv 2105.04663); Rajbhandari et al. 2020, ZeRO (1910.02054), stage 3.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = frugax.parallel.make_mesh(fsdp=-1, data=1)
        >>> with jax.set_mesh(mesh):
        ...     y = jax.jit(frugax.parallel.place_activations)(jnp.ones((mesh.size, 3, 2)))
        >>> y.shape[0] == mesh.size, y.sharding.shard_shape(y.shape)
        (True, (1, 3, 2))
    """
    split = automatic_axes()
    if not split:
        return x

    def part(size, names):
        names = tuple(name for name in names if name in split)
        divides = isinstance(size, int) and size % math.prod(split[name] for name in names) == 0
        return names if divides else PartitionSpec.UNCONSTRAINED

    rows, time, *rest = x.shape
    others: list[Any] = [None] * len(rest)
    if inner and rest:
        others[-1] = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(part(rows, BATCH_AXES), part(time, ("sequence",)), *others)
    return jax.lax.with_sharding_constraint(x, spec)


def automatic_axes() -> dict[str, int]:
    """Return the devices along each axis of `jax.set_mesh`'s mesh that the compiler splits arrays over.

    Axes of one device are left out, as are those that a `shard_map` around the call has made manual; of a
    mesh that is not `make_mesh`'s there are none, since its names may mean something else.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if set(mesh.axis_names) != set(AXES):
        return {}
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}
