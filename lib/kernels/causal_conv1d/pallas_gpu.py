"""The causal convolution on Hopper (Mosaic GPU): threads walk along time, the last W inputs in registers.

A thread has one or two channels. The copy engine brings a tile of tokens, and the W-1 before it, to shared
memory. A result takes the place of the input that has been read for the last time: there is no second tile.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import compat
from ..common.arguments import pad_to, trim
from ..common.chips import LANES
from ..common.hopper import launch
from ..common.tiling import round_up
from .inputs import Inputs
from .tiling import GPU_WIDEST, GPUTiling, for_gpu

WORDS = 32  # the copy engine moves 128 bytes at least


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the GPU kernel computes in float32 and bfloat16, not {call.x.dtype}"
    if call.width > GPU_WIDEST:
        return f"the GPU kernel takes filters of at most {GPU_WIDEST} taps, not {call.width}"
    return compat.local_gpu_lacks_mosaic()


def forward(call: Inputs, activation: str | None, *, interpret: bool) -> Array:
    """y [B, T, D] in x's dtype."""
    W, tiling = call.width, for_gpu(call)
    operands = _operands(call, tiling)
    x_BTD = operands[0]
    y_BTD = plgpu.kernel(
        partial(_forward_kernel, W=W, activation=activation, tiling=tiling, masked=call.reach is not None),
        out_type=jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype),
        scratch_types=[
            plgpu.SMEM((W - 1 + tiling.time, tiling.channels), x_BTD.dtype),
            plgpu.SMEM((tiling.time,), jnp.int32),
            plgpu.Barrier(num_arrivals=1 + (W > 1) + (call.reach is not None)),
        ],
        **_launch("causal_conv1d", x_BTD, tiling, interpret),
    )(*operands)
    return trim(y_BTD, call.x.shape)


def backward(call: Inputs, dy: Array, activation: str | None, *, interpret: bool) -> Inputs:
    """The gradients, as `Inputs`; z is computed again from x."""
    B, _, D = call.x.shape
    W, tiling = call.width, for_gpu(call)
    masked = call.reach is not None
    operands = _operands(call, tiling)
    x_BTD, before_BHD = operands[:2]
    tiles = x_BTD.shape[1] // tiling.time
    after = W - 1 if tiles > 1 else 0  # how many tokens after its own a tile needs
    dx_BTD, dbefore_BHD, dweight_BNWD = plgpu.kernel(
        partial(
            _backward_kernel,
            W=W,
            activation=activation,
            tiling=tiling,
            masked=masked,
            tiles=tiles,
            zeros=partial(_zeros, tiling, interpret),
        ),
        out_type=[
            jax.ShapeDtypeStruct(x_BTD.shape, x_BTD.dtype),
            jax.ShapeDtypeStruct(before_BHD.shape, x_BTD.dtype),
            jax.ShapeDtypeStruct((B, tiles, W + 1, x_BTD.shape[2]), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((W - 1 + tiling.time + after, tiling.channels), x_BTD.dtype),
            plgpu.SMEM((tiling.time + after, tiling.channels), x_BTD.dtype),
            plgpu.SMEM((tiling.time + round_up(after, WORDS),), jnp.int32),
            plgpu.Barrier(num_arrivals=(W > 1) + (2 + masked) * (1 + (after > 0))),
        ],
        **_launch("causal_conv1d_backward", x_BTD, tiling, interpret),
    )(*operands, pad_to(dy, x_BTD.shape))
    dweight_WD = dweight_BNWD.sum((0, 1))[:, :D]  # its last row is the bias's
    return Inputs(
        x=trim(dx_BTD, call.x.shape),
        weight=dweight_WD[:W].astype(call.weight.dtype),
        bias=None if call.bias is None else dweight_WD[W].astype(call.bias.dtype),
        initial_state=None if call.initial_state is None else dbefore_BHD[:, : W - 1, :D],
        reach=None,
    )


def _forward_kernel(x_ref, before_ref, weight_ref, bias_ref, *refs, W, activation, tiling, masked):
    reach_ref, y_ref, rows_smem, reach_smem, barrier = refs if masked else (None, *refs)
    b, _, channels, tokens = _place(tiling)
    _fetch_history(x_ref, before_ref, rows_smem, barrier, W, tiling)
    own = pl.ds(W - 1, tiling.time)
    plgpu.copy_gmem_to_smem(x_ref.at[b, tokens, channels], rows_smem.at[own], barrier)
    if masked:
        plgpu.copy_gmem_to_smem(reach_ref.at[b, tokens], reach_smem, barrier)
    weights, bias = _weights(weight_ref, bias_ref, channels)
    plgpu.barrier_wait(barrier)

    def step(group, window):
        for u in range(tiling.unroll):
            t = group * tiling.unroll + u
            window = (rows_smem[W - 1 + t].astype(jnp.float32), *window)
            reach = reach_smem[t] if masked else None
            z = _preactivation(weights, bias, [_within(reach, j, x) for j, x in enumerate(window)])
            y = z if activation is None else z * jax.nn.sigmoid(z)
            rows_smem[t] = y.astype(rows_smem.dtype)  # where x_{t-(W-1)} was
            window = window[: W - 1]
        return window

    window = tuple(rows_smem[W - 1 - j].astype(jnp.float32) for j in range(1, W))
    jax.lax.fori_loop(0, tiling.time // tiling.unroll, step, window)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows_smem.at[pl.ds(0, tiling.time)], y_ref.at[b, tokens, channels])
    plgpu.wait_smem_to_gmem(0)


def _backward_kernel(
    x_ref, before_ref, weight_ref, bias_ref, *refs, W, activation, tiling, masked, tiles, zeros
):
    reach_ref, *refs = refs if masked else (None, *refs)
    dy_ref, dx_ref, dbefore_ref, dweight_ref, rows_smem, dy_smem, reach_smem, barrier = refs
    time = tiling.time
    b, tile, channels, tokens = _place(tiling)
    last = tile == tiles - 1
    _fetch_history(x_ref, before_ref, rows_smem, barrier, W, tiling)

    def fetch(ref, smem, offset, grain, *columns):
        """This tile's tokens and the W-1 after them; the last tile, with none after it, fetches any."""
        plgpu.copy_gmem_to_smem(ref.at[b, tokens, *columns], smem.at[pl.ds(offset, time)], barrier)
        if tiles > 1 and W > 1:
            start, count = jnp.where(last, 0, (tile + 1) * time), round_up(W - 1, grain)
            after = smem.at[pl.ds(offset + time, count)]
            plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(start, count), *columns], after, barrier)

    fetch(x_ref, rows_smem, W - 1, 1, channels)
    fetch(dy_ref, dy_smem, 0, 1, channels)
    if masked:
        fetch(reach_ref, reach_smem, 0, WORDS)
    weights, bias = _weights(weight_ref, bias_ref, channels)
    plgpu.barrier_wait(barrier)

    def z_gradient(t, window):
        """dz_t, the taps of z_t, how far back they go, and the window of the next token."""
        window = (rows_smem[W - 1 + t].astype(jnp.float32), *window)
        reach = reach_smem[t] if masked else None
        taps = [_within(reach, j, x) for j, x in enumerate(window)]
        dz = dy_smem[t].astype(jnp.float32)
        if activation is not None:
            z = _preactivation(weights, bias, taps)
            s = jax.nn.sigmoid(z)
            dz *= s * (1 + z * (1 - s))
        return dz, taps, reach, window[: W - 1]

    def to_inputs(t, partials, dz, reach):
        """Add dz_t's share to the gradients of the W inputs it read, and store the one that is whole."""
        partials = [
            p + w * _within(reach, j, dz) for j, (p, w) in enumerate(zip(partials, weights, strict=True))
        ]
        rows_smem[t] = partials[W - 1].astype(rows_smem.dtype)  # where x_{t-(W-1)} was
        return (zeros(), *partials[: W - 1])

    def step(group, carry):
        window, partials, sums = carry
        for u in range(tiling.unroll):
            t = group * tiling.unroll + u
            dz, taps, reach, window = z_gradient(t, window)
            partials = to_inputs(t, partials, dz, reach)
            sums = tuple(s + dz * x for s, x in zip(sums, (*taps, 1.0), strict=True))
        return window, partials, sums

    window = tuple(rows_smem[W - 1 - j].astype(jnp.float32) for j in range(1, W))
    carry = window, (zeros(),) * W, (zeros(),) * (W + 1)
    window, partials, sums = jax.lax.fori_loop(0, time // tiling.unroll, step, carry)
    for t in range(time, time + W - 1):
        dz, reach = zeros(), None
        if tiles > 1:
            dz, _, reach, window = z_gradient(t, window)
            dz = jnp.where(last, 0.0, dz)
        partials = to_inputs(t, partials, dz, reach)

    for j, dweight in enumerate(sums[:W]):
        dweight_ref[b, tile, W - 1 - j, channels] = dweight
    dweight_ref[b, tile, W, channels] = sums[W]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows_smem.at[pl.ds(W - 1, time)], dx_ref.at[b, tokens, channels])
    if W > 1:

        @pl.when(tile == 0)
        def _():
            plgpu.copy_smem_to_gmem(rows_smem.at[pl.ds(0, W - 1)], dbefore_ref.at[b, :, channels])

    plgpu.wait_smem_to_gmem(0)


def _place(tiling: GPUTiling):
    """The sequence, the tile, and the slices of channels and of tokens that this block works on."""
    tile = jax.lax.axis_index("tile")
    channels = pl.ds(jax.lax.axis_index("channel") * tiling.channels, tiling.channels)
    return jax.lax.axis_index("batch"), tile, channels, pl.ds(tile * tiling.time, tiling.time)


def _fetch_history(x_ref, before_ref, rows_smem, barrier, W: int, tiling: GPUTiling) -> None:
    """Start the copy of the W-1 inputs before the tile, which come before its own in `rows_smem`."""
    if W == 1:
        return
    b, tile, channels, _ = _place(tiling)
    history = rows_smem.at[pl.ds(0, W - 1)]

    @pl.when(tile == 0)
    def _():
        plgpu.copy_gmem_to_smem(before_ref.at[b, :, channels], history, barrier)

    @pl.when(tile > 0)
    def _():
        rows = pl.ds(tile * tiling.time - (W - 1), W - 1)
        plgpu.copy_gmem_to_smem(x_ref.at[b, rows, channels], history, barrier)


def _weights(weight_ref, bias_ref, channels) -> tuple[list[Array], Array]:
    """The taps from the token's own backwards, and the bias, in registers."""
    W = weight_ref.shape[0]
    return [weight_ref[W - 1 - j, channels] for j in range(W)], bias_ref[channels]


def _preactivation(weights: list[Array], bias: Array, taps: list[Array]) -> Array:
    for weight, tap in zip(weights, taps, strict=True):
        bias = bias + weight * tap
    return bias


def _within(reach: Array | None, j: int, a: Array) -> Array:
    return a if reach is None or j == 0 else jnp.where(reach >= j, a, 0.0)


def _zeros(tiling: GPUTiling, interpret: bool) -> Array:
    zeros = jnp.zeros((tiling.channels,), jnp.float32)
    if interpret:
        return zeros
    return plgpu.layout_cast(zeros, plgpu.Layout.WG_STRIDED((tiling.channels,), tiling.channels // LANES))


def _launch(name: str, x_BTD: Array, tiling: GPUTiling, interpret: bool) -> dict:
    B, T, D = x_BTD.shape
    grid = dict(batch=B, tile=T // tiling.time, channel=D // tiling.channels)
    return dict(grid=tuple(grid.values()), grid_names=tuple(grid), **launch(name, interpret=interpret))


def _operands(call: Inputs, tiling: GPUTiling) -> list[Array]:
    """The operands of the kernels, in whole tiles. The history has a row that nothing reads where W = 1."""
    B, T, D = call.x.shape
    W = call.width
    T, D = round_up(T, tiling.time), round_up(D, tiling.channels)
    before = jnp.zeros((B, 0, D), call.x.dtype) if call.initial_state is None else call.initial_state
    bias = jnp.zeros((0,)) if call.bias is None else call.bias
    operands = [
        pad_to(call.x, (B, T, D)),
        pad_to(before, (B, max(W - 1, 1), D)),
        pad_to(call.weight.astype(jnp.float32), (W, D)),
        pad_to(bias.astype(jnp.float32), (D,)),
    ]
    return operands if call.reach is None else [*operands, pad_to(call.reach, (B, T))]
