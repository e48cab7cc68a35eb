"""The step on TPU: a tile of rows in fast memory, one group of each row after another.

Gradient and codes cross HBM once each way. A group is whole lanes of 32 rows: its scale is a maximum over
lanes, picked from and put back into a tile of scales by its column.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..common.chips import LANES
from ..common.tpu import Launch, iota
from .blocks import update_blocks
from .inputs import Inputs, Spec
from .tiling import ROWS, for_tpu


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.grad.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel reads float32 and bfloat16, not {call.grad.dtype}"
    if spec.ragged:
        return f"the TPU kernel takes rows of whole groups: {spec.group_size} does not divide the last axis"
    if spec.group_size % LANES:
        return f"the TPU kernel takes groups of a multiple of {LANES}, not {spec.group_size}"
    return None


def forward(
    call: Inputs, spec: Spec, *, interpret: bool
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """(update, codes, scales): like grad, and like each moment's."""
    *leading, N, G = call.grad.shape
    tiling = for_tpu(math.prod(leading), N, G)
    R = math.prod(leading) * N // tiling.groups
    wide = [x.reshape(R, tiling.groups * G) for x in (call.grad, *call.codes)]
    scales = [x.reshape(R, tiling.groups) for x in call.scales]
    k = len(scales)
    tile = pl.BlockSpec((tiling.rows, tiling.groups * G), lambda i: (i, 0))
    column = pl.BlockSpec((tiling.rows, tiling.groups), lambda i: (i, 0))
    grid = (pl.cdiv(R, tiling.rows),)
    launch = Launch(f"quantized_update_{spec.rule}", grid, ("parallel",), interpret=interpret)
    launch.add("hyper", call.hyper[None], pl.BlockSpec(memory_space=pltpu.SMEM))
    names = ["grad", *(f"code{i}" for i in range(k)), *(f"scale{i}" for i in range(k))]
    arrays = list(zip(names, [*wide, *scales], [*[tile] * (1 + k), *[column] * k], strict=True))
    for name, x, block in arrays:
        launch.add(name, x, block)
    for name, x, block in arrays:
        launch.write(f"new_{name}", x.shape, x.dtype, block, over=name)
    results = list(launch.run(partial(_kernel, spec=spec, groups=tiling.groups)).values())
    update, *codes = (x.reshape(call.grad.shape) for x in results[: 1 + k])
    return update, tuple(codes), tuple(s.reshape(call.scales[0].shape) for s in results[1 + k :])


def _kernel(*, hyper_ref, spec: Spec, groups: int, **refs):
    """refs: grad, codes, scales, and their new values: in the order in which they were added."""
    k = len(spec.elements)
    ins, outs = list(refs.values())[: 1 + 2 * k], list(refs.values())[1 + 2 * k :]
    hyper = [hyper_ref[0, i] for i in range(hyper_ref.shape[1])]
    at = iota((ROWS, groups), 1)

    def step(i, _):
        row = pl.multiple_of(lax.div(i, groups) * ROWS, ROWS)
        group = lax.rem(i, groups)
        start = pl.multiple_of(group * spec.group_size, spec.group_size)
        rows, columns, here = pl.ds(row, ROWS), pl.ds(start, spec.group_size), at == group
        scales = [jnp.sum(jnp.where(here, ref[rows, :], 0.0), axis=1, keepdims=True) for ref in ins[1 + k :]]
        codes = [ref[rows, columns] for ref in ins[1 : 1 + k]]
        update, codes, scales = update_blocks(ins[0][rows, columns], codes, scales, hyper, spec)
        outs[0][rows, columns] = update
        for ref, x in zip(outs[1 : 1 + k], codes, strict=True):
            ref[rows, columns] = x
        for ref, x in zip(outs[1 + k :], scales, strict=True):
            ref[rows, :] = jnp.where(here, x, ref[rows, :])
        return 0

    lax.fori_loop(0, ins[0].shape[0] // ROWS * groups, step, 0)
