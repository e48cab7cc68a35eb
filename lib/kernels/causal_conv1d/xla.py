"""The portable form: W shifted multiply-adds, which XLA fuses into one pass over the inputs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator
from .inputs import Inputs, with_history


def forward(call: Inputs, activation: str | None) -> Array:
    """y_t = act(bias + sum_w weight_w * x_{t-(W-1)+w}), over the taps that lie in the token's document."""
    return jax.checkpoint(partial(_forward, activation=activation))(call)  # keeps the inputs, and no sums


def _forward(call: Inputs, activation: str | None) -> Array:
    T, W = call.x.shape[1], call.width
    dtype = accumulator(call.x.dtype)
    history_BSD = with_history(call)
    z_BTD = 0 if call.bias is None else call.bias.astype(dtype)[None, None]
    for w in range(W):
        tap_BTD = history_BSD[:, w : w + T].astype(dtype)
        if call.reach is not None:
            tap_BTD = jnp.where((call.reach >= W - 1 - w)[..., None], tap_BTD, 0)
        z_BTD += call.weight[w].astype(dtype)[None, None] * tap_BTD
    return (z_BTD if activation is None else jax.nn.silu(z_BTD)).astype(call.x.dtype)
