"""Matrix products whose communication travels in pieces beside the computation, inside `jax.shard_map`."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..kernels.common.arguments import accumulator
from ..kernels.common.sharding import vary_like


def all_gather_matmul(
    x: Float[Array, "*b m k"], w: Float[Array, "k n"], *, axis_name: str, both_ways: bool = True
) -> Float[Array, "*b rows n"]:
    """Multiply rows that are spread over devices by this device's columns: all_gather(x) @ w.

    Each device multiplies the piece that it has while the next one travels round a ring, so that all but the
    first piece's time can hide behind the product's. The gradient of x is `matmul_reduce_scatter`, in pieces
    as well; for that of w all rows are kept as they come, and one product is taken. There is no `jax.jvp`.

    Args:
      x: this device's rows [..., M / P, K].
      w: this device's columns [K, N / P], as of the first matrix under Megatron's tensor parallelism.
      axis_name: the mesh axis of P devices.
      both_ways: send halves of a piece in opposite directions, for links that carry both at once; M / P is
        then even, else pieces go one way.

    Returns:
      [..., M, N / P], rows in the order of devices.

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
    return _gather(*_alike(x, w), axis_name, both_ways)


def matmul_reduce_scatter(
    x: Float[Array, "*b rows k"], w: Float[Array, "k n"], *, axis_name: str, both_ways: bool = True
) -> Float[Array, "*b own n"]:
    """Multiply by this device's rows of a matrix and keep this device's rows of the sum over devices.

    The same as psum_scatter(x @ w): partial sums of a piece travel round a ring, in the result's dtype, and
    each device adds its own product to them while the next piece's is computed. The gradient of x is
    `all_gather_matmul`. There is no `jax.jvp`.

    Args:
      x: [..., M, K / P].
      w: this device's rows [K / P, N], as of the second matrix under Megatron's tensor parallelism.
      axis_name: the mesh axis of P devices, which divide M.
      both_ways: as in `all_gather_matmul`.

    Returns:
      [..., M / P, N].

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
    P, rows = jax.lax.axis_size(axis_name), x.shape[-2]
    if rows % P:
        raise ValueError(f"x: got {rows} rows; expected a multiple of {P}, the devices of {axis_name!r}")
    return _scatter(*_alike(x, w), axis_name, both_ways)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather(x: Array, w: Array, axis_name: str, both_ways: bool) -> Array:
    return _gathered(x, w, axis_name, both_ways)[0]


def _gather_backward(axis_name, both_ways, residuals, dy):
    every, w = residuals
    dx = _scatter(dy, w.T, axis_name, both_ways)
    return dx.astype(every.dtype), _product_of_rows(every, dy).astype(w.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scatter(x: Array, w: Array, axis_name: str, both_ways: bool) -> Array:
    P, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    M = x.shape[-2] // P
    pieces = x.reshape(*x.shape[:-2], P, M, -1)
    parts = _ways(M, P, both_ways)
    dtype = jnp.result_type(x, w)
    wide = accumulator(dtype)

    def times_w(owner, start, end):
        mine = jax.lax.dynamic_index_in_dim(pieces, owner, pieces.ndim - 3, keepdims=False)
        return jnp.matmul(mine[..., start:end, :], w, preferred_element_type=wide)

    arriving: list[Array] = []
    for step in range(P - 1):
        # The pieces that are at home here after the steps that are left.
        totals = [times_w((here + way * (P - 1 - step)) % P, start, end) for start, end, way in parts]
        if step:
            totals = [y.astype(wide) + product for y, product in zip(arriving, totals, strict=True)]
        # In the result's dtype, as psum_scatter sends them; each sum by itself is of float32.
        arriving = _send([total.astype(dtype) for total in totals], parts, axis_name, P)
    # Apart from the last sum, or XLA would make one operation of both, which waits for the last messages.
    own = jax.lax.optimization_barrier(times_w(here, 0, M))
    return (own + jnp.concatenate(arriving, axis=-2).astype(wide) if arriving else own).astype(dtype)


def _scatter_backward(axis_name, both_ways, residuals, dy):
    x, w = residuals
    dx, every = _gathered(dy, w.T, axis_name, both_ways, keep=True)
    return dx.astype(x.dtype), _product_of_rows(x, every).astype(w.dtype)


def _gather_forward(x, w, axis_name, both_ways):
    y, every = _gathered(x, w, axis_name, both_ways, keep=True)
    return y, (every, w)


_gather.defvjp(_gather_forward, _gather_backward)
_scatter.defvjp(lambda x, w, *how: (_scatter(x, w, *how), (x, w)), _scatter_backward)


def _gathered(
    x: Array, w: Array, axis_name: str, both_ways: bool, *, keep: bool = False
) -> tuple[Array, Array | None]:
    """all_gather(x) @ w, and all_gather(x) itself if it is to be kept."""
    P, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    M = x.shape[-2]
    parts = _ways(M, P, both_ways)

    def room(columns, dtype):
        # Not zeros: to fill them takes a fifth of the time on TPU v5e, and each place is written once.
        return vary_like(jax.lax.empty((*x.shape[:-2], P, M, columns), dtype), (x, w))

    def put(out, rows, owner, start):
        at = (*(0,) * (x.ndim - 2), owner, start, 0)
        rows = jnp.expand_dims(rows, -3).astype(out.dtype)
        return jax.lax.dynamic_update_slice(out, rows, [jnp.int32(i) for i in at])

    out = room(w.shape[1], jnp.result_type(x, w))
    every = room(x.shape[-1], x.dtype) if keep else None
    arriving = _send([x[..., start:end, :] for start, end, _ in parts], parts, axis_name, P) if P > 1 else []
    pieces, places = [x], [(here, 0)]
    for step in range(P):
        for piece, place in zip(pieces, places, strict=True):
            out = put(out, piece @ w, *place)
            every = every if every is None else put(every, piece, *place)
        if step + 1 == P:
            break
        # Both ways in one step, or XLA would order the products of one way before the messages of the other.
        pieces = arriving
        # What travels one step up the ring each time came from so many devices below.
        places = [((here - way * (step + 1)) % P, start) for start, _, way in parts]
        if step + 2 < P:
            arriving = _send(pieces, parts, axis_name, P)
    whole = (*x.shape[:-2], P * M, -1)
    return out.reshape(whole), every if every is None else every.reshape(whole)


def _product_of_rows(x: Array, y: Array) -> Array:
    """x^T y, summed over all rows, in one product."""
    axes = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, y, axes=(axes, axes))


def _alike(x: Array, w: Array) -> tuple[Array, Array]:
    """Both typed as varying over the same axes, so that gradients of what does not are summed."""
    if x.ndim < 2 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"w: got {list(w.shape)} for x {list(x.shape)}; expected [{x.shape[-1]}, columns]")
    return vary_like(x, (x, w)), vary_like(w, (x, w))


def _ways(rows: int, devices: int, both: bool) -> list[tuple[int, int, int]]:
    """The parts of a piece that travel together: their first row, their end, and which way round the ring."""
    if both and devices > 2 and rows % 2 == 0:
        return [(0, rows // 2, 1), (rows // 2, rows, -1)]
    return [(0, rows, 1)]


def _send(
    pieces: list[Array], parts: list[tuple[int, int, int]], axis_name: str, devices: int
) -> list[Array]:
    """Send each piece to the next device, its way round."""

    def ring(way: int) -> list[tuple[int, int]]:
        return [(i, (i + way) % devices) for i in range(devices)]

    return [jax.lax.ppermute(x, axis_name, ring(way)) for x, (_, _, way) in zip(pieces, parts, strict=True)]
