"""The recurrence as the equation says it, one token at a time: what every backend is held to."""

import jax
import jax.numpy as jnp
from jax import Array

from .inputs import Inputs


def forward(inputs: Inputs, reverse: bool) -> tuple[Array, Array]:
    """h_t = a_t * h_{t-1} + b_t; from the last token to the first if `reverse`."""
    a, b, h0, starts = inputs

    def step(h_BD, token):
        a_BD, b_BD, start_B = token
        if start_B is not None:
            h_BD = jnp.where(start_B[:, None] == 1, 0, h_BD)
        h_BD = a_BD.astype(h_BD.dtype) * h_BD + b_BD.astype(h_BD.dtype)
        return h_BD, h_BD

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (a, b, starts))
    state, h = jax.lax.scan(step, h0, tokens, reverse=reverse)
    return jnp.moveaxis(h, 0, 1).astype(b.dtype), state
