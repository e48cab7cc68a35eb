"""Products of activations with matrices split over "tensor", their messages in pieces beside them."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from .activations import automatic_axes, tensor_rings, time_axes
from .axes import axes_of
from .collective_matmul import all_gather_matmul, matmul_reduce_scatter
from .rules import RULES


def ring_products(x: Array, matrices: Sequence[Array], path: str) -> list[Array] | None:
    """Multiply x [B, T, K] by matrices [K, N] that lie side by side in a param, by rings over "tensor".

    Args:
      x: between layers each device has a share of the tokens; inside of one, of the columns.
      matrices: by the logical axes of `path`, a first matrix of Megatron's tensor parallelism, split by
        columns, or a second, split by rows.
      path: of the param.

    Returns:
      The product with each; None where `tensor_messages` says "sums", or "tensor" splits no side
      of the param, does not divide what it would, or does not divide the tokens.
    """
    tensor, time = automatic_axes().get("tensor", 1), time_axes(x.shape[1]) if x.ndim == 3 else ()
    if not (time and tensor_rings()):
        return None
    inside = time[:-1] or None  # the axes that share time where each device has columns
    rows, columns = (RULES.get(axis or "") == "tensor" for axis in axes_of(path, 3)[0][-2:])
    if columns and not rows:
        return _by_columns(x, matrices, tensor, time, inside)
    if rows and not columns and len(matrices) == 1 and x.shape[2] % tensor == 0:
        return [
            jax.shard_map(
                lambda x, w: matmul_reduce_scatter(x, w, axis_name="tensor"),
                in_specs=(P(None, inside, "tensor"), P("tensor")),
                out_specs=P(None, time),
                axis_names=set(time),
            )(x, matrices[0])
        ]
    return None


def _by_columns(x, matrices, tensor, time, inside) -> list[Array]:
    """One ring for all matrices whose columns divide; the product with others is the compiler's."""
    split = [i for i, w in enumerate(matrices) if w.shape[1] % tensor == 0]

    def ring(x, *ws):
        y = all_gather_matmul(x, jnp.concatenate(ws, axis=1), axis_name="tensor")
        return jnp.split(y, list(itertools.accumulate(w.shape[1] for w in ws))[:-1], axis=-1)

    products = {i: jnp.dot(x, w) for i, w in enumerate(matrices) if i not in split}
    if split:
        ys = jax.shard_map(
            ring,
            in_specs=(P(None, time), *(P(None, "tensor"),) * len(split)),
            out_specs=[P(None, inside, "tensor")] * len(split),
            axis_names=set(time),
        )(x, *(matrices[i] for i in split))
        products |= dict(zip(split, ys, strict=True))
    return [products[i] for i in range(len(matrices))]
