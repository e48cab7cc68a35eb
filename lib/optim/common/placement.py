"""Placement of a leaf's state on a mesh: sharded as the leaf is, over the axes that both have."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .matrix_spec import View


def placed(state: Any, leaf: Any, view: View) -> Any:
    """Shard the arrays of a leaf's state as the leaf is, over the axes that they share with it.

    Nothing happens where the leaf's sharding can't be seen: inside `jit` over a mesh of automatic axes the
    compiler decides, or the caller's `out_shardings`.
    """
    sharding = _sharding(leaf)
    if sharding is None:
        return state
    spec = tuple(sharding.spec) + (None,) * (len(view.shape) - len(sharding.spec))
    (rows, cols), batch = view.axes, len(view.batch)
    m_axes, n_axes = (cols, rows) if view.swapped else (rows, cols)
    *_, m, n = view.matrices

    def along(axes: tuple[int, ...]) -> Any:
        return spec[axes[0]] if len(axes) == 1 else None

    def place(x: Array) -> Array:
        if x.ndim != batch + 2 or x.shape[:batch] != view.matrices[:-2]:
            return x
        sides = (along(m_axes) if x.shape[-2] == m else None, along(n_axes) if x.shape[-1] == n else None)
        wanted = NamedSharding(sharding.mesh, PartitionSpec(*(spec[a] for a in view.batch), *sides))
        return jax.sharding.reshard(x, wanted) if _explicit(sharding) else jax.device_put(x, wanted)

    return jax.tree.map(place, state)


def automatic(
    update: Callable[..., tuple[Array, Any]], g: Array, w: Array | None, state: Any, turn: Any
) -> tuple[Array, Any]:
    """Call `update(g, w, state, turn)` with an explicit mesh's axes automatic inside it.

    What it returns is typed as g and state are. Numbers that `update` closes over can't be traced there.
    """
    sharding = _sharding(g)
    if sharding is None or not _explicit(sharding):
        return update(g, w, state, turn)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())

    def same(x: Array) -> NamedSharding:
        found = _sharding(x)
        return replicated if found is None else found

    out = (sharding, jax.tree.map(same, state))
    return jax.sharding.auto_axes(update, axes=sharding.mesh.axis_names, out_sharding=out)(g, w, state, turn)


def _sharding(x: Any) -> NamedSharding | None:
    """The sharding of x over several devices, if it is known."""
    if not isinstance(x, Array):
        return None
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def _explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types
