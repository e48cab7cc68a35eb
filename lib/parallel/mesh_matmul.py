"""Matrix products on a square grid of devices with links to neighbours alone, inside `jax.shard_map`.

On such a grid what counts are the hops of a message, the messages on a path, and each device's memory. Blocks
move round a ring that is folded into a line: no step of it is longer than two hops, where the ring that
follows the line has one step from its end back to its start.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..kernels.common.arguments import accumulator
from ..kernels.common.sharding import vary_like


def folded_ring(devices: int) -> tuple[int, ...]:
    """Order the places of a line so that neighbours in the order, the last and the first too, are near.

    Args:
      devices: places of the line.

    Returns:
      The places: even ones up, odd ones down. Two neighbours are two apart at most.

    Source: He et al. 2025, WaferLLM (arXiv 2502.04563), its interleaved shift.

    Example:
        >>> import frugax
        >>> frugax.parallel.folded_ring(5)
        (0, 2, 4, 3, 1)
    """
    if devices < 1:
        raise ValueError(f"devices: got {devices}; expected at least 1")
    return (*range(0, devices, 2), *reversed(range(1, devices, 2)))


def mesh_gemm(
    a: Float[Array, "m k"], b: Float[Array, "k n"], *, axis_names: tuple[str, str]
) -> Float[Array, "m n"]:
    """Multiply matrices that are spread in blocks over a square grid: MeshGEMM.

    As in Cannon's algorithm each device multiplies the blocks that it has, and then blocks of A move along
    rows of the grid and those of B along columns: P steps, and memory for one block of each matrix. They move
    on folded rings, so that each step takes two hops at most.

    Args:
      a, b: blocks [M / P, K / P] and [K / P, N / P] of device (i, j), those of row i and column j.
      axis_names: the mesh axes of the grid's rows and columns, both of P devices.

    Returns:
      The block [M / P, N / P] of A B.

    Raises:
      ValueError: the grid is not square, or blocks don't fit each other.

    Source: He et al. 2025, WaferLLM (arXiv 2502.04563); Cannon 1969.

    Example:
        >>> import frugax, functools, jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1, 1), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
        >>> f = functools.partial(frugax.parallel.mesh_gemm, axis_names=("i", "j"))
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=P("i", "j"), out_specs=P("i", "j"))
        >>> jax.jit(f)(jnp.ones((4, 2)), jnp.ones((2, 3))).shape
        (4, 3)
    """
    rows, columns = axis_names
    P = jax.lax.axis_size(rows)
    if jax.lax.axis_size(columns) != P:
        got = f"{P} x {jax.lax.axis_size(columns)}"
        raise ValueError(f"axis_names: got a grid of {got}; expected a square one")
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"b: got a block {list(b.shape)}; expected [{a.shape[1]}, columns], as a's columns")
    ring = folded_ring(P)
    at = {place: i for i, place in enumerate(ring)}
    # Once: device (i, j) needs the blocks of inner index ring[at[i] + at[j]].
    inner = {(i, j): ring[(at[i] + at[j]) % P] for i in range(P) for j in range(P)}
    a = jax.lax.ppermute(a, axis_names, [(i * P + k, i * P + j) for (i, j), k in inner.items()])
    b = jax.lax.ppermute(b, axis_names, [(k * P + j, i * P + j) for (i, j), k in inner.items()])
    one_on = [(ring[(i + 1) % P], ring[i]) for i in range(P)]
    wide = accumulator(jnp.result_type(a, b))
    c = jnp.zeros((a.shape[0], b.shape[1]), wide)
    c = vary_like(c, (a, b))
    for step in range(P):
        c = c + jnp.matmul(a, b, preferred_element_type=wide)
        if step + 1 < P:
            a, b = jax.lax.ppermute(a, columns, one_on), jax.lax.ppermute(b, rows, one_on)
    return c.astype(jnp.result_type(a, b))


def mesh_gemv(
    x: Float[Array, "k"], w: Float[Array, "k n"], *, axis_name: str, levels: int = 2
) -> Float[Array, "n"]:
    """Multiply a vector by a matrix whose rows are spread over a line of devices: MeshGEMV.

    Partial sums go up a tree of `levels`: in groups of neighbours each device adds its own to what the next
    one sends, then the groups' first devices do likewise, and the sum comes back the same way. The hops are
    those of a line, but only levels * P ** (1 / levels) messages follow one another.

    Args:
      x: this device's part [K / P].
      w: this device's rows [K / P, N].
      axis_name: the mesh axis of the line.
      levels: of the tree; 1 is a chain.

    Returns:
      x W [N], on every device.

    Raises:
      ValueError: levels is below 1, or sizes don't fit each other.

    Source: He et al. 2025, WaferLLM (arXiv 2502.04563), its K-tree.

    Example:
        >>> import frugax, functools, jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
        >>> f = functools.partial(frugax.parallel.mesh_gemv, axis_name="i")
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
        >>> jax.jit(f)(jnp.ones(4), jnp.ones((4, 3))).tolist()
        [4.0, 4.0, 4.0]
    """
    if levels < 1:
        raise ValueError(f"levels: got {levels}; expected at least 1")
    if x.shape[0] != w.shape[0]:
        raise ValueError(f"w: got {list(w.shape)} for x {list(x.shape)}; expected [{x.shape[0]}, columns]")
    P = jax.lax.axis_size(axis_name)
    here = jax.lax.axis_index(axis_name)
    wide = accumulator(jnp.result_type(x, w))
    total = jnp.matmul(x, w, preferred_element_type=wide)
    strides = _strides(P, levels)
    for stride, size in strides:
        # Those at distance d from their group's first get what is behind them; the first has the sum.
        own = total
        for _ in range(size - 1):
            pairs = [(i + stride, i) for i in range(0, P - stride, stride) if (i // stride) % size < size - 1]
            total = own + jax.lax.ppermute(total, axis_name, pairs)
    for stride, size in reversed(strides):
        for _ in range(size - 1):
            pairs = [(i, i + stride) for i in range(0, P - stride, stride) if (i // stride) % size < size - 1]
            sent = jax.lax.ppermute(total, axis_name, pairs)
            receives = (here % stride == 0) & ((here // stride) % size > 0)
            total = jnp.where(receives, sent, total)
    return total.astype(jnp.result_type(x, w))


class MeshCost(NamedTuple):
    """The critical path of a product on a grid of P x P devices, and what a device holds.

    Attributes:
      hops: between neighbours that a message takes, one after the other.
      messages: that follow one another.
      blocks: of the matrices' size over P * P that a device holds.

    Example:
        >>> import frugax
        >>> frugax.parallel.mesh_cost("meshgemm", 8).hops < frugax.parallel.mesh_cost("cannon", 8).hops
        True
    """

    hops: int
    messages: int
    blocks: int


def mesh_cost(
    method: Literal["meshgemm", "cannon", "summa", "allgather", "ktree", "ring"], devices: int
) -> MeshCost:
    """Count the critical path of a method, its first alignment left out.

    Args:
      method: of products of matrices "meshgemm", "cannon" (its ring follows the line), "summa" (a broadcast
        along a row and a column in each step), "allgather" (all blocks of a row and a column first); of sums
        over a line "ktree" of two levels, or "ring" (a reduce-scatter and an all-gather).
      devices: P, along one side of the grid.

    Source: He et al. 2025, WaferLLM (arXiv 2502.04563), whose model counts latency by hops and messages.

    Example:
        >>> import frugax
        >>> frugax.parallel.mesh_cost("meshgemm", 8)
        MeshCost(hops=14, messages=7, blocks=3)
    """
    P = devices
    if P < 1:
        raise ValueError(f"devices: got {P}; expected at least 1")
    ring = folded_ring(P)
    longest = max(abs(ring[i] - ring[(i + 1) % P]) for i in range(P)) if P > 1 else 0
    tree = _strides(P, 2)
    costs = {
        "meshgemm": MeshCost((P - 1) * longest, P - 1, 3),
        "cannon": MeshCost((P - 1) * (P - 1), P - 1, 3),
        "summa": MeshCost(P * (P - 1), P, 5),
        "allgather": MeshCost(P - 1, P - 1, 2 * P + 1),
        "ktree": MeshCost(
            2 * sum(stride * (size - 1) for stride, size in tree), 2 * sum(size - 1 for _, size in tree), 1
        ),
        "ring": MeshCost(2 * (P - 1) * max(P - 1, 1), 2 * (P - 1), 1),
    }
    if method not in costs:
        raise ValueError(f"method: got {method!r}; expected one of {', '.join(costs)}")
    return costs[method]


def _strides(devices: int, levels: int) -> list[tuple[int, int]]:
    """For each level of a tree over a line, the distance of its members and how many a group has."""
    strides, stride = [], 1
    for level in range(levels):
        groups = math.ceil(devices / stride)
        size = math.ceil(round(groups ** (1 / (levels - level)), 9))
        if size > 1:
            strides.append((stride, size))
        stride *= size
    return strides
