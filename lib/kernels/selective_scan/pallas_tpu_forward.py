"""The TPU kernel that walks forward: outputs, and for the gradient the states before each block of time."""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .pallas_tpu_blocks import F32, OverStates, Plan, silu, step_sizes


def forward_kernel(
    plan: Plan, *, x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, dt_bias_ref, initial_state_ref,
    y_ref, final_state_ref, state_ref, tile0_ref, tile1_ref, sums0_ref,
    z_ref=None, keep_ref=None, states_ref=None,
):  # fmt: skip
    """y and the final state; state_ref carries the state from block to block."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_state_ref[...]

    if states_ref is not None:
        states_ref[...] = state_ref[...]

    def visit(row, h):
        rows = pl.ds(row, plan.tiling.rows)
        x = x_ref[rows, :].astype(F32)
        dt = step_sizes(plan, dt_ref[rows, :].astype(F32) + dt_bias_ref[...])
        tile0_ref[...], tile1_ref[...] = dt, dt * x
        B, C = plan.columns(B_ref, row), plan.columns(C_ref, row)
        keeps = None if keep_ref is None else plan.columns(keep_ref, row)
        y = OverStates(sums0_ref)
        for r in range(plan.tiling.rows):
            a = plan.keep(keeps, r, jnp.exp2(plan.spread(tile0_ref, r) * A_ref[...]))
            h = a * h + plan.spread(tile1_ref, r) * plan.column(B, r)
            y.put(r, h * plan.column(C, r))
        out = y.rows() + D_ref[...] * x
        if z_ref is not None:
            out = out * silu(z_ref[rows, :].astype(F32))
        y_ref[rows, :] = out.astype(y_ref.dtype)
        return h

    state_ref[...] = plan.each_tile(visit, state_ref[...])

    @pl.when(pl.program_id(2) == plan.blocks - 1)
    def _():
        final_state_ref[...] = state_ref[...]
