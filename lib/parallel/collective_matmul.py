"""Matrix products whose communication travels in pieces beside the computation, inside `jax.shard_map`."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..kernels.common.sharding import vary_like


def all_gather_matmul(
    x: Float[Array, "m k"], w: Float[Array, "k n"], *, axis_name: str, both_ways: bool = True
) -> Float[Array, "rows n"]:
    """Multiply rows that are spread over devices by this device's columns: all_gather(x) @ w.

    Each device multiplies the piece that it has while the next one travels round a ring, so that all but the
    first piece's time can hide behind the product's. The gradient of x is `matmul_reduce_scatter`, in pieces
    as well.

    Args:
      x: this device's rows [M / P, K].
      w: this device's columns [K, N / P], as of the first matrix under Megatron's tensor parallelism.
      axis_name: the mesh axis of P devices.
      both_ways: send halves of a piece in opposite directions, for links that carry both at once; M / P is
        then even, else pieces go one way.

    Returns:
      [M, N / P], rows in the order of devices.

    Source: Wang et al. 2023, Overlap Communication with Dependent Computation via Decomposition
    (doi 10.1145/3567955.3567959); Jiang et al. 2024, MegaScale (arXiv 2402.15627).

    Example:
        >>> import frugax, functools, jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = frugax.parallel.make_mesh(tensor=-1, data=1)
        >>> f = functools.partial(frugax.parallel.all_gather_matmul, axis_name="tensor")
        >>> specs = dict(in_specs=(P("tensor"), P(None, "tensor")), out_specs=P(None, "tensor"))
        >>> jax.jit(jax.shard_map(f, mesh=mesh, **specs))(jnp.eye(8), jnp.ones((8, 8))).shape
        (8, 8)
    """
    _check(x, w)
    P, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    M = x.shape[0]
    halves = [(x, 1)]
    if both_ways and P > 2 and M % 2 == 0:
        halves = [(x[: M // 2], 1), (x[M // 2 :], -1)]
    out = vary_like(jnp.zeros((P, M, w.shape[1]), jnp.result_type(x, w)), (x, w))
    start = 0
    for piece, way in halves:
        for step in range(P):
            # What travels one step up the ring each time came from so many devices below.
            following = _send(piece, axis_name, P, way) if step + 1 < P else piece
            product = piece @ w
            owner = (here - way * step) % P
            at = owner, jnp.int32(start), jnp.int32(0)
            out = jax.lax.dynamic_update_slice(out, product[None].astype(out.dtype), at)
            piece = following
        start += piece.shape[0]
    return out.reshape(P * M, -1)


def matmul_reduce_scatter(
    x: Float[Array, "rows k"], w: Float[Array, "k n"], *, axis_name: str, both_ways: bool = True
) -> Float[Array, "own n"]:
    """Multiply by this device's rows of a matrix and keep this device's rows of the sum over devices.

    The same as psum_scatter(x @ w): partial sums of a piece travel round a ring, and each device adds its own
    product to them while the next piece's is computed. The gradient of x is `all_gather_matmul`.

    Args:
      x: [M, K / P].
      w: this device's rows [K / P, N], as of the second matrix under Megatron's tensor parallelism.
      axis_name: the mesh axis of P devices, which divide M.
      both_ways: as in `all_gather_matmul`.

    Returns:
      [M / P, N].

    Raises:
      ValueError: devices don't divide the rows.

    Source: Pati et al. 2024, T3 (arXiv 2401.16677), the part of it that needs no hardware: a product's tiles
    are sent as they are made, in staggered order; Jiang et al. 2024, MegaScale (arXiv 2402.15627).

    Example:
        >>> import frugax, functools, jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = frugax.parallel.make_mesh(tensor=-1, data=1)
        >>> f = functools.partial(frugax.parallel.matmul_reduce_scatter, axis_name="tensor")
        >>> specs = dict(in_specs=(P(None, "tensor"), P("tensor")), out_specs=P("tensor"))
        >>> jax.jit(jax.shard_map(f, mesh=mesh, **specs))(jnp.eye(8), jnp.ones((8, 8))).shape
        (8, 8)
    """
    _check(x, w)
    P, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    if x.shape[0] % P:
        raise ValueError(
            f"x: got {x.shape[0]} rows; expected a multiple of {P}, the devices of {axis_name!r}"
        )
    M = x.shape[0] // P
    pieces = x.reshape(P, M, -1)
    halves = [(0, M, 1)]
    if both_ways and P > 2 and M % 2 == 0:
        halves = [(0, M // 2, 1), (M // 2, M, -1)]
    done = []
    for start, end, way in halves:
        total = None
        for step in range(P):
            # The piece that is at home here after the steps that are left.
            owner = (here + way * (P - 1 - step)) % P
            mine = jax.lax.dynamic_index_in_dim(pieces, owner, keepdims=False)[start:end]
            product = jnp.matmul(mine, w, preferred_element_type=jnp.float32)
            total = product if total is None else _send(total, axis_name, P, way) + product
        done.append(total)
    return jnp.concatenate(done).astype(jnp.result_type(x, w))


def overlapped_seconds(compute: float, communication: float, pieces: int) -> float:
    """Bound the seconds of a product and its communication, cut in as many pieces: a pipeline of two stages.

    The first piece's computation and the last one's communication have nothing beside them.

    Args:
      compute, communication: seconds of the whole of each.
      pieces: at least 1.

    Source: Pati et al. 2024, T3 (arXiv 2401.16677), whose ideal is the longer of the two alone.

    Example:
        >>> import frugax
        >>> [frugax.parallel.overlapped_seconds(4.0, 2.0, n) for n in (1, 4)]
        [6.0, 4.5]
    """
    if pieces < 1:
        raise ValueError(f"pieces: got {pieces}; expected at least 1")
    return (compute + communication + (pieces - 1) * max(compute, communication)) / pieces


def _send(x: Array, axis_name: str, devices: int, way: int) -> Array:
    return jax.lax.ppermute(x, axis_name, [(i, (i + way) % devices) for i in range(devices)])


def _check(x: Array, w: Array) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"w: got {list(w.shape)} for x {list(x.shape)}; expected [{x.shape[-1]}, columns]")
