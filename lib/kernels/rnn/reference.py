"""The cells as their equations say it, one token at a time: what every backend is held to."""

import jax
import jax.numpy as jnp
from jax import Array

from .inputs import Inputs


def forward(call: Inputs) -> tuple[Array, Array]:
    """h [B, T, H, D] in gates' dtype, and the last state [B, S, H, D]."""
    cell = call.cell
    dtype = call.initial_state.dtype
    recurrent, bias = call.recurrent.astype(dtype), call.bias.astype(dtype)
    starts = jnp.zeros(call.gates.shape[:2], bool) if call.starts is None else call.starts

    def step(state_BSHD, token):
        x_BHGD, start_B = token
        state_BSHD = jnp.where(start_B[:, None, None, None], 0, state_BSHD)
        r_BHGD = jnp.einsum("bhi,hgio->bhgo", state_BSHD[:, 0], recurrent, precision="highest") + bias[None]
        pre = cell.combine(list(jnp.moveaxis(x_BHGD, 2, 0)), list(jnp.moveaxis(r_BHGD, 2, 0)))
        state = cell.step(pre, [state_BSHD[:, s] for s in cell.reads])
        return jnp.stack(state, axis=1), state[0]

    tokens = jnp.moveaxis(call.gates.astype(dtype), 1, 0), jnp.moveaxis(starts, 1, 0)
    state, h = jax.lax.scan(step, call.initial_state, tokens)
    return jnp.moveaxis(h, 0, 1).astype(call.gates.dtype), state
