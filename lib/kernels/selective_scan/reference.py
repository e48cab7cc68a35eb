"""The selective scan as the equation says it, one token at a time: what every backend is held to."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..common.sharding import vary_like
from .inputs import Inputs, finish, step_size


@partial(jax.jit, static_argnames="softplus")
def forward(call: Inputs, softplus: bool) -> tuple[Array, Array]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t;  y_t = (C_t h_t + D x_t) silu(z_t)."""
    dtype = call.A.dtype
    starts = jnp.zeros(call.x.shape[:2], jnp.int32) if call.starts is None else call.starts

    def step(h_BDN, token):
        x_BD, dt_BD, B_BN, C_BN, start_B = token
        h_BDN = jnp.where(start_B[:, None, None] == 1, 0, h_BDN)
        source_BDN = (dt_BD * x_BD.astype(dtype))[..., None] * B_BN[:, None, :]
        h_BDN = jnp.exp(dt_BD[..., None] * call.A[None]) * h_BDN + source_BDN
        return h_BDN, jnp.sum(h_BDN * C_BN[:, None, :], -1)

    tokens = (call.x, step_size(call, softplus), call.B, call.C, starts)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    state, y = jax.lax.scan(step, vary_like(call.initial_state, call), tokens)
    return finish(call, jnp.moveaxis(y, 0, 1)), state
