"""Places of activations on a mesh: rows over a batch's axes, time over "sequence", and "tensor" if asked."""

import math
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from .mesh import AXES, BATCH_AXES

TENSOR_MESSAGES = ("sums", "rings")
_MESSAGES = jax.make_user_context("sums")  # a part of the key of JAX's caches


def tensor_messages(way: str) -> AbstractContextManager[None]:
    """Choose what devices along "tensor" send each other around products: a context for what is traced in it.

    The numbers are the same, but for the order of sums.

    Args:
      way: "sums": each device has all tokens between layers, and the partial products of each are summed, as
        the compiler sees fit. "rings": each has its share of the tokens between layers, as in Megatron's
        sequence parallelism, which `all_gather_matmul` gathers and `matmul_reduce_scatter` sums. What these
        can't split is left to the compiler: packed, ternary or low-bit matrices, and tokens or columns that
        the devices don't divide. Rings have no `jax.jvp`.

    Raises:
      ValueError: there is no such way.

    Source: Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053); Korthikanti et al. 2022, Reducing Activation
    Recomputation in Large Transformer Models (2205.05198), for rings.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = frugax.parallel.make_mesh(tensor=-1, data=1)
        >>> x = jnp.ones((2, mesh.size, 4))
        >>> with jax.set_mesh(mesh), frugax.parallel.tensor_messages("rings"):
        ...     y = jax.jit(frugax.parallel.place_activations)(x)
        >>> y.sharding.shard_shape(y.shape)
        (2, 1, 4)
    """
    if way not in TENSOR_MESSAGES:
        raise ValueError(f"way: got {way!r}; expected one of {', '.join(map(repr, TENSOR_MESSAGES))}")
    context: AbstractContextManager[None] = _MESSAGES(way)
    return context


def tensor_rings() -> bool:
    """Tell if `tensor_messages` says "rings"."""
    return bool(_MESSAGES.value == "rings")


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
    shared = time_axes(time) if tensor_rings() and not inner else ()
    others: list[Any] = [None] * len(rest)
    if inner and rest:
        others[-1] = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(part(rows, BATCH_AXES), shared or part(time, ("sequence",)), *others)
    return jax.lax.with_sharding_constraint(x, spec)


def time_axes(time: int) -> tuple[str, ...]:
    """Return the axes that share the tokens between layers where "tensor" does too; () where it can't."""
    split = automatic_axes()
    names = tuple(name for name in ("sequence", "tensor") if name in split)
    divides = isinstance(time, int) and time % math.prod(split[name] for name in names) == 0
    return names if "tensor" in names and divides else ()


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


def in_stage() -> bool:
    """Tell if a `shard_map` around has some axes of the mesh and the compiler others, as in a pipeline."""
    return bool(automatic_axes()) and AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
