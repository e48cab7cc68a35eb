"""The TPU kernel that walks forward: outputs, and for the gradient the states before each block of time."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..common.tpu import F32
from .pallas_tpu_blocks import OverStates, Spec, silu, step_sizes


def forward_kernel(
    spec: Spec, *, x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, dt_bias_ref, initial_state_ref,
    y_ref, final_state_ref, state_ref, dt_tile_ref, input_tile_ref, sums_ref,
    z_ref=None, keep_ref=None, states_ref=None,
):  # fmt: skip
    """y and the final state; state_ref carries the state from block to block."""

    @spec.grid.at_start()
    def _():
        state_ref[...] = initial_state_ref[...]

    if states_ref is not None:
        states_ref[...] = state_ref[...]

    def visit(row, h):
        rows = pl.ds(row, spec.tiling.rows)
        x = x_ref[rows, :].astype(F32)
        dt = step_sizes(spec, dt_ref[rows, :].astype(F32) + dt_bias_ref[...])
        dt_tile_ref[...], input_tile_ref[...] = dt, dt * x
        B, C = spec.columns(B_ref, row), spec.columns(C_ref, row)
        keeps = None if keep_ref is None else spec.columns(keep_ref, row)
        y = OverStates(sums_ref)
        for r in range(spec.tiling.rows):
            a = jnp.exp2(spec.spread(dt_tile_ref, r) * A_ref[...])
            h = a * spec.fresh(keeps, r, h) + spec.spread(input_tile_ref, r) * spec.column(B, r)
            y.put(r, h * spec.column(C, r))
        out = y.rows() + D_ref[...] * x
        if z_ref is not None:
            out = out * silu(z_ref[rows, :].astype(F32))
        y_ref[rows, :] = out.astype(y_ref.dtype)
        return h

    state_ref[...] = spec.each_tile(visit, state_ref[...])

    @spec.grid.at_end()
    def _():
        final_state_ref[...] = state_ref[...]
