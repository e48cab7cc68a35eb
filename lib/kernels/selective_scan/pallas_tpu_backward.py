"""The TPU kernel of the gradient: a block's states computed anew, then walked back over."""

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ..common.chips import LANES, SUBLANES
from ..common.tpu import F32, iota
from .pallas_tpu_blocks import OverStates, Spec, sigmoid, silu, step_sizes

LN_2 = float(np.log(2))


def backward_kernel(
    spec: Spec, *, x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, dt_bias_ref, dy_ref, d_final_ref, states_ref,
    dx_ref, ddt_ref, dB_ref, dC_ref, dD_ref, ddt_bias_ref, dA_ref, dinitial_state_ref,
    before_ref, carry_ref, step_ref, dout_ref, dt_tile_ref, input_tile_ref, dout_tile_ref,
    sums_ref, exponent_sums_ref, z_ref=None, dz_ref=None, keep_ref=None,
):  # fmt: skip
    """before[t]: the state before token t; carry: what the token just visited sends to the state before it;
    step, dout: dt and the gradient of C h, for each token of the block; tiles: dt, dt * x and the gradient of
    C h of those at work; sums: for `OverStates`."""

    tokens = spec.tiling.rows

    @spec.grid.at_start()
    def _():
        carry_ref[...] = d_final_ref[...]
        for ref in (dD_ref, ddt_bias_ref, dA_ref):
            ref[...] = jnp.zeros_like(ref)

    def states(row, h):
        rows = pl.ds(row, tokens)
        x, dy = x_ref[rows, :].astype(F32), dy_ref[rows, :].astype(F32)
        dt = step_sizes(spec, dt_ref[rows, :].astype(F32) + dt_bias_ref[...])
        dt_tile_ref[...], input_tile_ref[...], step_ref[rows, :] = dt, dt * x, dt
        B = spec.columns(B_ref, row)
        C = None if z_ref is None else spec.columns(C_ref, row)
        keeps = None if keep_ref is None else spec.columns(keep_ref, row)
        y = OverStates(sums_ref)
        for r in range(tokens):
            a = jnp.exp2(spec.spread(dt_tile_ref, r) * A_ref[...])
            before_ref[row + r] = h
            h = a * spec.fresh(keeps, r, h) + spec.spread(input_tile_ref, r) * spec.column(B, r)
            if C is not None:
                y.put(r, h * spec.column(C, r))
        if z_ref is not None:
            z = z_ref[rows, :].astype(F32)
            gate = sigmoid(z)
            slope = gate * (1 + z * (1 - gate))
            dz_ref[rows, :] = (dy * (y.rows() + D_ref[...] * x) * slope).astype(dz_ref.dtype)
            dy = dy * silu(z)
        dout_ref[rows, :] = dy
        return h

    before_ref[spec.tiling.time] = spec.each_tile(states, states_ref[...])
    dB_ref[...], dC_ref[...] = jnp.zeros_like(dB_ref), jnp.zeros_like(dC_ref)
    lane = iota((spec.tiling.states, LANES), 1)

    def back(row, carry):
        dh, dA, dB, dC = carry
        rows = pl.ds(row, tokens)
        x, dy_rows, dt = x_ref[rows, :].astype(F32), dout_ref[rows, :], step_ref[rows, :]
        dt_tile_ref[...], input_tile_ref[...], dout_tile_ref[...] = dt, dt * x, dy_rows
        B, C = spec.columns(B_ref, row), spec.columns(C_ref, row)
        keeps = None if keep_ref is None else spec.columns(keep_ref, row)
        dsource, dexponent = OverStates(sums_ref), OverStates(exponent_sums_ref)
        for r in range(tokens - 1, -1, -1):
            t = row + r
            dy, before = spec.spread(dout_tile_ref, r), spec.fresh(keeps, r, before_ref[t])
            dh = dh + spec.column(C, r) * dy
            here = lane == t
            dC = jnp.where(here, jnp.sum(spec.over_tiles(before_ref[t + 1] * dy), 1, keepdims=True), dC)
            dB = jnp.where(
                here, jnp.sum(spec.over_tiles(dh * spec.spread(input_tile_ref, r)), 1, keepdims=True), dB
            )
            dsource.put(r, dh * spec.column(B, r))
            dh = spec.fresh(keeps, r, jnp.exp2(spec.spread(dt_tile_ref, r) * A_ref[...]) * dh)
            dlog = dh * before
            dexponent.put(r, dlog * A_ref[...])
            dA = dA + dlog * spec.spread(dt_tile_ref, r)
        ds = dsource.rows()
        dx_ref[rows, :] = (dy_rows * D_ref[...] + ds * dt).astype(dx_ref.dtype)
        ddt = LN_2 * dexponent.rows() + ds * x
        if spec.softplus:
            # softplus' slope, sigmoid(raw) = exp(raw - softplus(raw)): exact for small steps too
            ddt = ddt * jnp.exp(dt_ref[rows, :].astype(F32) + dt_bias_ref[...] - dt)
        ddt_ref[rows, :] = ddt.astype(ddt_ref.dtype)
        for ref, value in ((dD_ref, dy_rows * x), (ddt_bias_ref, ddt)):
            ref[...] += sum(value[i : i + SUBLANES] for i in range(0, tokens, SUBLANES))
        return dh, dA, dB, dC

    none = jnp.zeros((spec.tiling.states, LANES), F32)
    start = (carry_ref[...], dA_ref[...], none, none)
    dh, dA, dB, dC = spec.each_tile(back, start, backwards=True)
    carry_ref[...], dA_ref[...] = dh, dA
    dB_ref[...], dC_ref[...] = dB, dC

    @spec.grid.at_end()
    def _():
        dinitial_state_ref[...] = carry_ref[...]
