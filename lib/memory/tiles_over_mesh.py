"""Tiles of time over a mesh: params come to each device once, and their gradients leave it once."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from ..parallel.activations import automatic_axes
from ..parallel.mesh import BATCH_AXES
from .tiles import tiled


def tiled_over_mesh(fn: Callable[[Any, Any], Any], params: Any, x: Any, tiles: int) -> Any:
    """fn(params, x), a tile of time at a time as by `tiled`, with one exchange of params between devices.

    `tiled` alone leaves it to the compiler, which gathers params that are shared over the mesh axis "fsdp"
    for every tile, and sums their gradients over devices after every tile. Here each device gathers them
    before the first tile and sums its own gradients over its tiles; those of all devices are summed once.
    That holds under `jax.set_mesh` of a mesh that splits rows and time alone. Without one, or where devices
    share matrices ("tensor") or don't divide x, this is `tiled`.

    Args:
      fn: (params, x) -> results that have x's rows and time, such as a head and its cross entropy.
      params: a tree of arrays, placed anyhow.
      x: a tree of arrays [B, T, ...].
      tiles: how many, on each device.

    Returns:
      fn's results, arrays [B, T, ...] or a tree of them.

    Raises:
      ValueError: as `tiled`.

    Source: Rajbhandari et al. 2020, ZeRO (arXiv 1910.02054), stage 3, and Bekman et al. 2025, Arctic Long
    Sequence Training (2506.13996), each of which gathers params a layer at a time.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> losses = lambda head, x: jax.nn.logsumexp(x @ head, -1)
        >>> with jax.set_mesh(frugax.parallel.make_mesh(fsdp=-1, data=1)):
        ...     args = jnp.ones((4, 9)), jnp.ones((jax.device_count(), 10, 4))
        ...     jax.jit(lambda *a: frugax.memory.tiled_over_mesh(losses, *a, tiles=5))(*args).shape[1:]
        (10,)
    """
    split = automatic_axes()
    batch = tuple(name for name in BATCH_AXES if name in split)
    rows, shards = math.prod(split[name] for name in batch), split.get("sequence", 1)
    divides = all(leaf.shape[0] % rows == 0 and leaf.shape[1] % shards == 0 for leaf in jax.tree.leaves(x))
    if tiles < 2 or not split or {*split} - {*batch, "sequence"} or not divides:
        return tiled(functools.partial(fn, params), x, tiles)
    spec = PartitionSpec(batch, "sequence" if shards > 1 else None)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    run = jax.shard_map(
        lambda params, x: tiled(functools.partial(fn, params), x, tiles),
        in_specs=(PartitionSpec(), spec),
        out_specs=spec,
        axis_names={name for name, kind in kinds if kind == AxisType.Auto},
        check_vma=False,  # the sum of gradients over devices would else stand in the loop of tiles
    )
    return run(params, x)
