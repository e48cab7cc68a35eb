"""The causal convolution on TPU: channels on lanes, time on sublanes, one read of each input.

A block of x and the few rows before it are laid out in a float32 scratch, 128 channels at a time, where the
W shifted reads are loads at any row. The backward pass walks a sequence from its end, as the gradient of an
input needs those of the W-1 sums after it: they stay in scratch.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..common.arguments import pad_to
from ..common.chips import LANES, SUBLANES
from ..common.tiling import round_up
from ..common.tpu import F32, Launch, TimeGrid, iota
from .inputs import Inputs
from .tiling import TPU_WIDEST, TPUTiling, for_tpu


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel computes in float32 and bfloat16, not {call.x.dtype}"
    if call.width > TPU_WIDEST:
        return f"the TPU kernel takes filters of at most {TPU_WIDEST} taps, not {call.width}"
    return None


def forward(call: Inputs, activation: str | None, *, interpret: bool) -> Array:
    """y [B, T, D] in x's dtype."""
    B, T, D = call.x.shape
    tiling = for_tpu(call, time=1024, channels=512)
    lanes = round_up(D, LANES)
    grid = (B, pl.cdiv(T, tiling.time), lanes // tiling.channels)
    launch = Launch("causal_conv1d", grid, ("parallel",) * 3, interpret=interpret)
    _read(launch, call, tiling, lambda b, t, d: (b, t, d), lambda t: t)
    block = pl.BlockSpec((1, tiling.time, tiling.channels), lambda b, t, d: (b, t, d))
    launch.write("y", (B, T, lanes), call.x.dtype, block)
    launch.hold("history", _history(tiling))
    got = launch.run(partial(_forward_kernel, activation=activation, tiling=tiling))
    return got["y"][:, :, :D]


def backward(call: Inputs, dy: Array, activation: str | None, *, interpret: bool) -> Inputs:
    """The gradients, as `Inputs`; z is computed again from x."""
    B, T, D = call.x.shape
    W = call.width
    tiling = for_tpu(call, time=512, channels=512)
    time, halo, channels = tiling.time, tiling.halo, tiling.channels
    lanes = round_up(D, LANES)
    grid = TimeGrid((lanes // channels, B), T, time, backwards=True)
    # The sums of weight and bias over the batch stay in VMEM.
    order = ("parallel", "arbitrary", "arbitrary")
    launch = Launch("causal_conv1d_backward", grid.sizes, order, interpret=interpret)
    _read(launch, call, tiling, lambda d, b, i: (b, i, d), grid.at, dy=_pad_channels(dy))
    block = pl.BlockSpec((1, time, channels), lambda d, b, i: (b, grid.at(i), d))
    launch.write("dx", (B, T, lanes), call.x.dtype, block)
    before = pl.BlockSpec((1, halo, channels), lambda d, b, i: (b, 0, d))
    launch.write("dbefore", (B, halo, lanes), launch.operands["before"][0].dtype, before)
    weight = pl.BlockSpec((W, SUBLANES, channels), lambda d, b, i: (0, 0, d))
    launch.write("dweight", (W, SUBLANES, lanes), F32, weight)
    launch.write("dbias", (SUBLANES, lanes), F32, pl.BlockSpec((SUBLANES, channels), lambda d, b, i: (0, d)))
    launch.hold("history", _history(tiling))
    launch.hold("dz", _history(tiling))
    if call.reach is not None:
        launch.hold("reach_after", (time + halo, LANES), jnp.int32)
    tokens_in_last = T - (grid.steps - 1) * time
    got = launch.run(
        partial(_backward_kernel, activation=activation, tiling=tiling, tokens_in_last=tokens_in_last)
    )
    return Inputs(
        x=got["dx"][:, :, :D],
        weight=got["dweight"].sum(1)[:, :D].astype(call.weight.dtype),
        bias=None if call.bias is None else got["dbias"].sum(0)[:D].astype(call.bias.dtype),
        initial_state=None if call.initial_state is None else got["dbefore"][:, halo - W + 1 :, :D],
        reach=None,
    )


def _forward_kernel(
    *, x_ref, previous_ref, before_ref, weight_ref, bias_ref, y_ref, history_ref, reach_ref=None,
    activation, tiling,
):  # fmt: skip
    _lay_out(history_ref, x_ref, previous_ref, before_ref, tiling, pl.program_id(1) == 0)
    for c in range(tiling.channels // LANES):
        lanes = pl.ds(c * LANES, LANES)
        weight_W1L, bias_1L = _weights(weight_ref, bias_ref, lanes)

        @pl.loop(0, tiling.time // tiling.rows)
        def _(r, c=c, lanes=lanes, weight_W1L=weight_W1L, bias_1L=bias_1L):
            rows = pl.ds(pl.multiple_of(r * tiling.rows, tiling.rows), tiling.rows)
            reach_RL = None if reach_ref is None else reach_ref[0, rows, :].astype(jnp.int32)
            z_RL = bias_1L
            for j, weight_1L in enumerate(weight_W1L):
                z_RL += weight_1L * _within(reach_RL, j, _before(history_ref, c, r, j, tiling))
            if activation is not None:
                z_RL *= jax.nn.sigmoid(z_RL)
            y_ref[0, rows, lanes] = z_RL.astype(y_ref.dtype)


def _backward_kernel(
    *, x_ref, previous_ref, before_ref, weight_ref, bias_ref, dy_ref, dx_ref, dbefore_ref, dweight_ref,
    dbias_ref, history_ref, dz_ref, reach_ref=None, reach_after_ref=None, activation, tiling, tokens_in_last,
):  # fmt: skip
    i, blocks = pl.program_id(2), pl.num_programs(2)
    last, first = i == 0, i == blocks - 1
    time, halo, R = tiling.time, tiling.halo, tiling.rows
    _lay_out(history_ref, x_ref, previous_ref, before_ref, tiling, first)

    @pl.when((pl.program_id(1) == 0) & last)
    def _():
        dweight_ref[...] = jnp.zeros_like(dweight_ref)
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    @pl.when(last)  # nothing comes after it
    def _():
        dz_ref[:, pl.ds(0, halo), :] = jnp.zeros((dz_ref.shape[0], halo, LANES), jnp.float32)
        if reach_after_ref is not None:
            reach_after_ref[pl.ds(0, halo), :] = jnp.zeros((halo, LANES), jnp.int32)

    dz_ref[:, pl.ds(time, halo), :] = dz_ref[:, pl.ds(0, halo), :]
    if reach_after_ref is not None:
        reach_after_ref[pl.ds(time, halo), :] = reach_after_ref[pl.ds(0, halo), :]
        reach_after_ref[pl.ds(0, time), :] = reach_ref[0].astype(jnp.int32)

    valid = jnp.where(last, tokens_in_last, time)  # rows past the sequence's end hold anything, NaN too
    for c in range(tiling.channels // LANES):
        lanes = pl.ds(c * LANES, LANES)
        weight_W1L, bias_1L = _weights(weight_ref, bias_ref, lanes)

        def chunk(n, sums, c=c, lanes=lanes, weight_W1L=weight_W1L, bias_1L=bias_1L):
            r = time // R - 1 - n
            start = pl.multiple_of(r * R, R)
            rows = pl.ds(start, R)
            reach_RL = None if reach_ref is None else reach_ref[0, rows, :].astype(jnp.int32)
            taps_RL = [
                _within(reach_RL, j, _before(history_ref, c, r, j, tiling)) for j in range(len(weight_W1L))
            ]
            dz_RL = dy_ref[0, rows, lanes].astype(jnp.float32)
            if activation is not None:
                z_RL = bias_1L + sum(w_1L * tap_RL for w_1L, tap_RL in zip(weight_W1L, taps_RL, strict=True))
                s_RL = jax.nn.sigmoid(z_RL)
                dz_RL *= s_RL * (1 + z_RL * (1 - s_RL))
            if tokens_in_last != time:
                inside_RL = start + iota((R, LANES), 0) < valid
                dz_RL = jnp.where(inside_RL, dz_RL, 0)
                taps_RL = [jnp.where(inside_RL, tap_RL, 0) for tap_RL in taps_RL]
            dz_ref[c, rows, :] = dz_RL
            dx_ref[0, rows, lanes] = _to_inputs(dz_ref, reach_after_ref, c, start, R, weight_W1L).astype(
                dx_ref.dtype
            )
            products_RL = [dz_RL * tap_RL for tap_RL in taps_RL] + [dz_RL]
            return [s + _fold(p_RL) for s, p_RL in zip(sums, products_RL, strict=True)]

        zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * (len(weight_W1L) + 1)
        *dweight, dbias_8L = jax.lax.fori_loop(0, time // R, chunk, zeros)
        for j, dweight_8L in enumerate(dweight):
            dweight_ref[len(dweight) - 1 - j, :, lanes] += dweight_8L
        dbias_ref[:, lanes] += dbias_8L

        @pl.when(first)
        def _(c=c, lanes=lanes, weight_W1L=weight_W1L):
            dbefore_HL = _to_state(dz_ref, reach_after_ref, c, halo, weight_W1L)
            dbefore_ref[0, :, lanes] = dbefore_HL.astype(dbefore_ref.dtype)


def _lay_out(history_ref, x_ref, previous_ref, before_ref, tiling: TPUTiling, first):
    """Fill [channels / 128, halo + time, 128] in float32: the rows before the block, then the block's."""
    for c in range(tiling.channels // LANES):
        lanes = pl.ds(c * LANES, LANES)
        previous_HL = previous_ref[0, :, lanes].astype(jnp.float32)
        before_HL = before_ref[0, :, lanes].astype(jnp.float32)
        history_ref[c, pl.ds(0, tiling.halo), :] = jnp.where(first, before_HL, previous_HL)
        history_ref[c, pl.ds(tiling.halo, tiling.time), :] = x_ref[0, :, lanes].astype(jnp.float32)


def _before(history_ref, c: int, r, j: int, tiling: TPUTiling) -> Array:
    """The inputs j tokens before those of the block's r-th group of rows."""
    start = pl.multiple_of(r * tiling.rows, tiling.rows) + (tiling.halo - j)
    return history_ref[c, pl.ds(start, tiling.rows), :]


def _to_inputs(dz_ref, reach_after_ref, c: int, start, rows: int, weight_W1L: list[Array]) -> Array:
    """sum_j w_j dz_{s+j}, for `rows` inputs s from `start`."""
    dx_RL = jnp.zeros((rows, LANES), jnp.float32)
    for j, weight_1L in enumerate(weight_W1L):
        after = pl.ds(start + j, rows)
        reach_RL = None if reach_after_ref is None else reach_after_ref[after, :]
        dx_RL += weight_1L * _within(reach_RL, j, dz_ref[c, after, :])
    return dx_RL


def _to_state(dz_ref, reach_after_ref, c: int, halo: int, weight_W1L: list[Array]) -> Array:
    """The same for the `halo` inputs before the sequence, whose own dz is zero."""
    dz_HL = dz_ref[c, pl.ds(0, halo), :]
    reach_HL = None if reach_after_ref is None else reach_after_ref[pl.ds(0, halo), :]
    row_HL = iota((halo, LANES), 0)
    dbefore_HL = jnp.zeros((halo, LANES), jnp.float32)
    for j, weight_1L in enumerate(weight_W1L[1:], 1):
        shifted_HL = pltpu.roll(
            _within(reach_HL, j, dz_HL), halo - j, 0
        )  # row s of the halo reads s + j - halo
        dbefore_HL += weight_1L * jnp.where(row_HL >= halo - j, shifted_HL, 0)
    return dbefore_HL


def _within(reach_RL: Array | None, j: int, a_RL: Array) -> Array:
    return a_RL if reach_RL is None or j == 0 else jnp.where(reach_RL >= j, a_RL, 0)


def _weights(weight_ref, bias_ref, lanes) -> tuple[list[Array], Array]:
    """The taps from the token's own backwards, and the bias: each [1, 128]."""
    W = weight_ref.shape[0]
    return [weight_ref[pl.ds(W - 1 - j, 1), lanes] for j in range(W)], bias_ref[:, lanes]


def _fold(a_RL: Array) -> Array:
    """Sum groups of 8 rows: vector adds only; XLA adds the last 8."""
    return a_RL.reshape(-1, SUBLANES, LANES).sum(0)


def _history(tiling: TPUTiling) -> tuple[int, int, int]:
    return (tiling.channels // LANES, tiling.halo + tiling.time, LANES)


def _pad_channels(a: Array) -> Array:
    return pad_to(a, (*a.shape[:-1], round_up(a.shape[-1], LANES)))


def _read(
    launch: Launch, call: Inputs, tiling: TPUTiling, order: Callable, at: Callable, dy: Array | None = None
) -> None:
    """Add what the kernels read: whole lanes, the state at a halo's end, the reach copied to every lane.

    Args:
      order: a grid step's place along the grid's axes -> along (batch, time, channels).
      at: the place along time -> the block of time visited there.
    """
    B, _, D = call.x.shape
    time, halo, channels = tiling.time, tiling.halo, tiling.channels

    def spec(shape: tuple[int, ...], index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: index(*order(*step)))

    state = call.initial_state
    if state is None:
        state = jnp.zeros((B, 0, D), call.x.dtype)
    state = jnp.pad(state, ((0, 0), (halo - state.shape[1], 0), (0, 0)))
    bias = jnp.zeros((1, D)) if call.bias is None else call.bias[None]
    reach = None
    if call.reach is not None:
        reach = jnp.broadcast_to(call.reach.astype(jnp.int8)[..., None], (*call.reach.shape, LANES))
    x, state, weight, bias = (_pad_channels(a) for a in (call.x, state, call.weight, bias))

    block = spec((1, time, channels), lambda b, t, d: (b, at(t), d))
    previous = spec((1, halo, channels), lambda b, t, d: (b, jnp.maximum(at(t) * (time // halo) - 1, 0), d))
    launch.add("x", x, block)
    launch.add("previous", x, previous)
    launch.add("before", state, spec((1, halo, channels), lambda b, t, d: (b, 0, d)))
    launch.add("weight", weight.astype(F32), spec((call.width, channels), lambda b, t, d: (0, d)))
    launch.add("bias", bias.astype(F32), spec((1, channels), lambda b, t, d: (0, d)))
    launch.add("dy", dy, block)
    launch.add("reach", reach, spec((1, time, LANES), lambda b, t, d: (b, at(t), 0)))
