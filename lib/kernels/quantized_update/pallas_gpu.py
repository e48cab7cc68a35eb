"""The step on Hopper (Mosaic GPU): a warpgroup takes one group after another, neighbours side by side.

Threads read and write device memory directly, each a few neighbours: every line is read whole, and once. Some
groups are loaded before the first is worked on, so that loads overlap. Only the maxima cross threads.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import compat
from ..common.chips import WARPGROUP
from ..common.hopper import launch
from .blocks import update_blocks
from .inputs import Inputs, Spec
from .tiling import GPU_AT_ONCE, GPU_GROUP_SIZES, GPU_GROUPS


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.grad.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the GPU kernel reads float32 and bfloat16, not {call.grad.dtype}"
    if spec.ragged:
        return f"the GPU kernel takes rows of whole groups: {spec.group_size} does not divide the last axis"
    if spec.group_size not in GPU_GROUP_SIZES:
        return f"the GPU kernel takes groups of {GPU_GROUP_SIZES}, not {spec.group_size}"
    return compat.local_gpu_lacks_mosaic()


def forward(
    call: Inputs, spec: Spec, *, interpret: bool
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """(update, codes, scales): like grad, and like each moment's."""
    G, k = spec.group_size, len(spec.elements)
    wide = [x.reshape(-1) for x in (call.grad, *call.codes)]
    scales = [x.reshape(-1) for x in call.scales]
    n = scales[0].size
    per_block = min(GPU_GROUPS, n)
    layout = plgpu.Layout.WG_STRIDED((G,), min(G // WARPGROUP, 4))  # which bytes and floats must share

    def body(hyper_ref, *refs):
        ins, outs = refs[: 1 + 2 * k], refs[1 + 2 * k :]
        # The last block starts early enough to be whole: two then write the same groups alike.
        first = jnp.minimum(lax.axis_index("block") * per_block, n - per_block)
        hyper = [hyper_ref[i] for i in range(call.hyper.size)]

        def load(group):
            here = pl.ds(group * G, G)
            read = [ref[here] if interpret else compat.gpu_load(ref.at[here], layout) for ref in ins[: 1 + k]]
            return read, [ref[group] for ref in ins[1 + k :]]

        def work(groups):
            loaded = [load(group) for group in groups]
            for group, ((grad, *codes), scales) in zip(groups, loaded, strict=True):
                update, codes, scales = update_blocks(
                    grad, codes, scales, hyper, spec, largest=jnp.max, sqrt=_sqrt
                )
                here = pl.ds(group * G, G)
                for ref, x in zip(outs, (update, *codes), strict=False):
                    ref[here] = x
                for ref, x in zip(outs[1 + k :], scales, strict=True):
                    ref[group] = x

        def step(i, _):
            work([first + i * GPU_AT_ONCE + j for j in range(GPU_AT_ONCE)])
            return 0

        lax.fori_loop(0, per_block // GPU_AT_ONCE, step, 0)
        done = per_block // GPU_AT_ONCE * GPU_AT_ONCE
        for j in range(done, per_block):
            work([first + j])

    results = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*wide, *scales)],
        grid=(pl.cdiv(n, per_block),),
        grid_names=("block",),
        **launch(f"quantized_update_{spec.rule}", interpret=interpret),
    )(call.hyper, *wide, *scales)
    update, *codes = (x.reshape(call.grad.shape) for x in results[: 1 + k])
    return update, tuple(codes), tuple(s.reshape(call.scales[0].shape) for s in results[1 + k :])


def _sqrt(x: Array) -> Array:
    """Mosaic GPU has the reciprocal root alone."""
    return jnp.where(x > 0, x * lax.rsqrt(x), 0.0)
