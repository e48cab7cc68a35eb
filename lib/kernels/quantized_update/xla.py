"""The portable form, which CPU gets: a chunk at a time, in place, so that no moment is whole in float32."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from ...formats.dynamic import Dynamic
from ...formats.lookup import Lookup, lookup
from ..common.sharding import AxisNames, per_shard
from .blocks import update_blocks
from .inputs import INDEPENDENT, Inputs, Spec, argument_axes, result_axes
from .tiling import CHUNK


def forward(call: Inputs, spec: Spec) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """(update, codes, scales): like grad, and like each moment's."""
    axes = AxisNames((argument_axes(call, spec),), result_axes(call, spec))
    # A cache looks the dynamic map up faster than it is computed; TPU has no such cache.
    tables = {i: lookup(f) for i, f in enumerate(spec.elements) if isinstance(f, Dynamic)}
    with_tables = AxisNames(
        (*axes.arguments, dict.fromkeys(tables, Lookup("codes", "signs buckets"))), axes.results
    )
    loop = partial(_loop, spec=spec)
    # XLA would gather what a loop takes slices of: it is told that each shard has a loop of its own. TPU's
    # compiler can't ask.
    on_tpu = per_shard(partial(loop, tables={}), axes, INDEPENDENT, partitioner=False)
    elsewhere = per_shard(loop, with_tables, INDEPENDENT)
    return lax.platform_dependent(call, tables, tpu=lambda call, _: on_tpu(call), default=elsewhere)


def _loop(
    call: Inputs, tables: Mapping[int, Lookup], *, spec: Spec
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    row = call.grad.shape[-1]  # a group, or a row of groups of which the last is short
    n = math.prod(call.grad.shape[:-1])
    wide = (call.grad, *call.codes)
    arrays = [x.reshape(n, row) for x in wide] + [s.reshape(n, -1) for s in call.scales]
    # Of a small leaf a quarter: a chunk's float32 copies then take less than what 8 bits save.
    rows = max(1, min(CHUNK // row, n // 4))
    spec = spec._replace(elements=tuple(tables.get(i, f) for i, f in enumerate(spec.elements)))
    step = partial(_update_rows, hyper=call.hyper, spec=spec)
    # The update takes the gradient's place, so that nothing of its size is written twice.
    arrays = lax.fori_loop(0, n // rows, lambda i, arrays: step(arrays, i * rows, rows), arrays)
    if n % rows:
        arrays = step(arrays, n - n % rows, n % rows)
    update, *codes = (x.reshape(y.shape) for x, y in zip(arrays, wide, strict=False))
    scales = (x.reshape(y.shape) for x, y in zip(arrays[len(wide) :], call.scales, strict=True))
    return update, tuple(codes), tuple(scales)


def _update_rows(arrays: Sequence[Array], start, rows: int, *, hyper: Array, spec: Spec):
    """Arrays with `rows` rows from `start` on replaced: the whole groups of each, then the short ones."""
    k = len(spec.elements)
    row, G = arrays[0].shape[1], spec.group_size
    whole = row // G * G
    for column, width in ((0, whole), (whole, row - whole)):
        if width == 0:
            continue
        size = min(G, width)
        places = [(start, column)] * (1 + k) + [(start, column // G)] * k
        shapes = [(rows, width)] * (1 + k) + [(rows, width // size)] * k

        def chunk(arrays, places=places, shapes=shapes):
            return [lax.dynamic_slice(x, at, s) for x, at, s in zip(arrays, places, shapes, strict=True)]

        def updated(arrays, chunk=chunk, size=size, shapes=shapes):
            grad, *rest = chunk(arrays)
            update, codes, scales = update_blocks(
                grad.reshape(-1, size),
                [c.reshape(-1, size) for c in rest[:k]],
                [s.reshape(-1, 1) for s in rest[k:]],
                list(hyper),
                spec,
                largest=_by_halves,
            )
            return [x.reshape(s) for x, s in zip((update, *codes, *scales), shapes, strict=True)]

        # Scales are never negative. But XLA can't know, and so does not fuse the arithmetic into the writing
        # in place, which it leaves to one core.
        new = lax.cond(arrays[-1][0, 0] < 0, chunk, updated, arrays)
        arrays = [lax.dynamic_update_slice(x, y, at) for x, y, at in zip(arrays, new, places, strict=True)]
    return arrays


def _by_halves(x: Array) -> Array:
    """The maximum of each row [n, 1], halving rows: on CPU XLA's own reduction takes twice as long."""
    while (width := x.shape[1]) > 1:
        half = -(-width // 2)
        x = jnp.maximum(x[:, :half], x[:, width - half :])  # of an odd width, both have the middle one
    return x
