"""Soft routing: every slot of an expert is a mean of all tokens, and every token one of all slots."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .routing import Mask, check_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftRouting:
    """Shares of tokens in the slots of experts, and of slots in tokens' outputs, all of them positive.

    Attributes:
      into: [T, E, S], the share of each token in a slot's input; over tokens they sum to 1.
      out: [T, E, S], the share of each slot in a token's output; over slots they sum to 1.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.soft_route(jnp.array([[[0.0]], [[0.0]]]))
        >>> routing.into.shape, routing.out.sum(axis=(1, 2)).tolist()
        ((2, 1, 1), [1.0, 1.0])
    """

    into: Any
    out: Any


def soft_route(logits: Float[Array, "t e s"], *, mask: Mask = None) -> SoftRouting:
    """Mix all tokens into every slot: nothing is chosen and nothing dropped.

    Not for causal models: a slot sees all tokens.

    Args:
      logits: of tokens and the S slots of each expert. The paper's are of inputs and slots of unit length
        times a learned scale.
      mask: tokens that count; the others are in no slot and get nothing.

    Raises:
      ValueError: logits are no floats [T, E, S], or mask is not [T].

    Source: Puigcerver et al. 2023, Soft MoE (arXiv 2308.00951).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.soft_route(jnp.zeros((4, 2, 1)))
        >>> float(routing.into[0, 0, 0]), float(routing.out[0, 0, 0])
        (0.25, 0.5)
    """
    if logits.ndim != 3 or 0 in logits.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        got = f"{logits.dtype}{list(logits.shape)}"
        raise ValueError(f"logits: got {got}; expected floats [tokens, experts, slots]")
    check_mask(mask, logits)
    logits = logits.astype(jnp.float32)
    real = jnp.ones(logits.shape[:1], bool) if mask is None else mask
    seen = jnp.where(real[:, None, None], logits, -jnp.inf)
    into = jnp.where(real.any(), jax.nn.softmax(seen, 0), 0.0)
    out = jax.nn.softmax(logits.reshape(len(logits), -1), -1).reshape(logits.shape)
    return SoftRouting(into, jnp.where(real[:, None, None], out, 0.0))
