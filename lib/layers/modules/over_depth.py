"""Arguments that differ by layer: made once for a whole decoder, handed to each layer of its scan over depth.

A mixer names one of these as its `over_depth`; called with (depth, width), it gives the keyword arguments of
the mixer's calls, each with the layers on its leading axis.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from .inputs import beside


class LayerFraction(nn.Module):
    """{"fraction": l / (L - 1)} for the layers l = 0..L-1 of a decoder of L, and 0 where L is 1."""

    param_dtype: DTypeLike = jnp.float32

    def __call__(self, depth: int, width: int) -> dict[str, Array]:
        return {"fraction": jnp.arange(depth) / max(depth - 1, 1)}


class ForgetFloors(nn.Module):
    """{"floor": [L, D]}: the least that each channel's forget gate can be, from 0 in the first layer up.

    The steps from layer to layer are a softmax over depth, learned, equal at first.

    Source: HGRN, Qin et al. 2023 (arXiv 2311.04823).
    """

    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, depth: int, width: int) -> dict[str, Array]:
        logits = self.param("logits", nn.initializers.zeros, (depth, width), self.param_dtype)
        steps = jax.nn.softmax(logits, axis=0)
        return {"floor": jnp.cumsum(steps.at[0].set(0), axis=0)}


def floored_gate(logits: Array, floor: Array | None) -> tuple[Array, Array]:
    """(log f, 1 - f) of the gate f = floor + (1 - floor) sigmoid(logits), both exact for f near 0 and near 1.

    Args:
      logits: any shape [..., D]; below -60 they count as -60, where the gate is closed but its log finite.
      floor: [D] in [0, 1); None means 0.
    """
    lowest = 0.0 if floor is None else beside(floor, logits)
    z = jnp.maximum(logits, -60.0)
    log_f = jax.nn.log_sigmoid(z) + jnp.log1p(lowest * jnp.exp(-z))
    return jnp.minimum(log_f, 0), (1 - lowest) * jax.nn.sigmoid(-z)  # rounding can leave it above 0
