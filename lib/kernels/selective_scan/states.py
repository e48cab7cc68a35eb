"""The states of `selective_scan` after some of a row's tokens, in plain JAX: for `segment_states`."""

import jax.numpy as jnp
from jax import Array

from ..common import rows
from .inputs import Inputs, step_size


def states_at(call: Inputs, softplus: bool, places: Array) -> Array:
    """The states [B, M, D, N] after the tokens `places` [B, M]; -1 is the state before the first.

    A loop over tokens on every platform.
    """
    dt_BTD = step_size(call, softplus)
    tokens = dt_BTD, dt_BTD * call.x.astype(dt_BTD.dtype), call.B, call.starts

    def step(h_BDN, token):
        dt_BD, source_BD, B_BN, starts_B = token
        if starts_B is not None:
            h_BDN = jnp.where(starts_B[:, None, None] == 1, 0, h_BDN)
        return jnp.exp(dt_BD[..., None] * call.A[None]) * h_BDN + source_BD[..., None] * B_BN[:, None]

    time_first = [None if x is None else jnp.moveaxis(x, 1, 0) for x in tokens]
    return rows.states_at(step, call.initial_state, time_first, places)
