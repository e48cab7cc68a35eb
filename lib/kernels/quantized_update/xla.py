"""The portable form, which CPU gets: a chunk at a time, in place, so that no moment is whole in float32."""

import math
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from ..sharding import per_shard
from .blocks import update_blocks
from .inputs import INDEPENDENT, Inputs, Spec, axes_of
from .tiling import CHUNK


def forward(call: Inputs, spec: Spec) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """(update, codes, scales): like grad, and like each moment's."""

    def split(partitioner: bool):
        # XLA would gather what a loop takes slices of: it is told that each shard has a loop of its own.
        return per_shard(partial(_loop, spec=spec), axes_of(call, spec), INDEPENDENT, partitioner=partitioner)

    return lax.platform_dependent(call, tpu=split(False), default=split(True))  # TPU's compiler can't ask


def _loop(call: Inputs, spec: Spec) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    row = call.grad.shape[-1]  # a group, or a row of groups of which the last is short
    n = math.prod(call.grad.shape[:-1])
    wide = (call.grad, *call.codes)
    arrays = [x.reshape(n, row) for x in wide] + [s.reshape(n, -1) for s in call.scales]
    rows = min(n, max(1, CHUNK // row))

    def visit(start, arrays, rows):
        chunk = [lax.dynamic_slice_in_dim(x, start, rows) for x in arrays]
        k = len(call.codes)
        results = _update_rows(chunk[0], chunk[1 : 1 + k], chunk[1 + k :], call.hyper, spec)
        return [lax.dynamic_update_slice_in_dim(x, y, start, 0) for x, y in zip(arrays, results, strict=True)]

    # The update takes the gradient's place, so that nothing of its size is written twice.
    arrays = lax.fori_loop(0, n // rows, lambda i, arrays: visit(i * rows, arrays, rows), arrays)
    if n % rows:
        arrays = visit(n - n % rows, arrays, n % rows)
    update, *codes = (x.reshape(y.shape) for x, y in zip(arrays, wide, strict=False))
    scales = (x.reshape(y.shape) for x, y in zip(arrays[len(wide) :], call.scales, strict=True))
    return update, tuple(codes), tuple(scales)


def _update_rows(grad, codes, scales, hyper, spec: Spec) -> list[Array]:
    """Rows [R, row] and scales [R, groups of a row]: short groups are filled with zeros."""
    R, row = grad.shape
    groups = -(-row // spec.group_size)

    def blocks(x):
        if spec.ragged:
            x = jnp.pad(x, ((0, 0), (0, groups * spec.group_size - row)))
        return x.reshape(R * groups, spec.group_size)

    def rows(x):
        return x.reshape(R, -1)[:, :row]

    update, codes, scales = update_blocks(
        blocks(grad), [blocks(c) for c in codes], [s.reshape(-1, 1) for s in scales], list(hyper), spec,
        valid=_valid(R, row, groups, spec) if spec.ragged else None,
    )  # fmt: skip
    return [rows(update), *map(rows, codes), *(s.reshape(R, groups) for s in scales)]


def _valid(R: int, row: int, groups: int, spec: Spec) -> Array:
    at = jnp.arange(groups * spec.group_size).reshape(groups, spec.group_size) < row
    return jnp.tile(at, (R, 1))
