"""The causal convolution as the equation says it: one token at a time. What every backend is held to."""

import jax
import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator
from .inputs import Inputs, with_history


def forward(call: Inputs, activation: str | None) -> Array:
    """y_t = act(bias + sum_w weight_w * x_{t-(W-1)+w}), over the taps that lie in the token's document."""
    dtype = accumulator(call.x.dtype)
    W, T = call.width, call.x.shape[1]
    history_BSD = with_history(call).astype(dtype)
    weight_WD = call.weight.astype(dtype)
    # Cast out here: inside the loop the cast's gradient would add up in the bias's own dtype.
    bias_D = jnp.zeros((), dtype) if call.bias is None else call.bias.astype(dtype)[None]
    back_W = jnp.arange(W - 1, -1, -1)

    def token(t):
        taps_BWD = jax.lax.dynamic_slice_in_dim(history_BSD, t, W, axis=1)
        if call.reach is not None:
            reach_B = jax.lax.dynamic_index_in_dim(call.reach, t, axis=1, keepdims=False)
            taps_BWD = jnp.where((back_W[None] <= reach_B[:, None])[..., None], taps_BWD, 0)
        z_BD = jnp.sum(weight_WD[None] * taps_BWD, axis=1) + bias_D
        return z_BD if activation is None else z_BD * jax.nn.sigmoid(z_BD)

    return jnp.moveaxis(jax.lax.map(token, jnp.arange(T)), 0, 1).astype(call.x.dtype)
