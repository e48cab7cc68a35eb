"""The states of `rnn` after some of a row's tokens, in plain JAX: for `lengths` and `segment_states`."""

import jax.numpy as jnp
from jax import Array

from ..common import rows
from .inputs import Inputs


def states_at(call: Inputs, h: Array, places: Array) -> Array:
    """The states [B, N, S, H, D] after the tokens `places` [B, N]; -1 is the state before the first.

    h [B, T, H, D], which `rnn` returned, is what the matrices meet: one product over all tokens gives every
    pre-activation, and what is left of the recurrence is elementwise.
    """
    cell, dtype = call.cell, call.initial_state.dtype
    first = call.initial_state[:, :1].astype(h.dtype)[:, 0][:, None]
    before = jnp.concatenate([first, h[:, :-1]], axis=1)
    if call.starts is not None:
        before = jnp.where(call.starts[..., None, None], 0, before)
    r = jnp.einsum(
        "bthi,hgio->bthgo", before.astype(call.recurrent.dtype), call.recurrent,
        precision="highest", preferred_element_type=dtype,
    )  # fmt: skip
    r = r + call.bias[None, None].astype(dtype)
    of_gates = [[y[..., g, :] for g in range(cell.gates)] for y in (call.gates.astype(dtype), r)]
    tokens = cell.combine(*of_gates), call.starts

    def step(state, token):
        pre, start_B = token
        if start_B is not None:
            state = [jnp.where(start_B[:, None, None], 0, s) for s in state]
        return list(cell.step(pre, [state[s] for s in cell.reads]))

    initial = list(jnp.moveaxis(call.initial_state, 1, 0))
    time_first = [[jnp.moveaxis(y, 1, 0) for y in tokens[0]], None if call.starts is None else call.starts.T]
    return jnp.stack(rows.states_at(step, initial, time_first, places), axis=2)
