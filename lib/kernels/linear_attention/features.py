"""Feature maps that a kernel makes of q and k itself, a chunk at a time: features never lie in memory."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from .inputs import Inputs


def taylor(x: Float[Array, "*n d"]) -> Float[Array, "*n f"]:
    """Taylor features: their inner product is exp's second-order polynomial, 1 + x.y + (x.y)^2 / 2.

    They are 1, x_i, x_i^2 / sqrt(2), and x_i x_j for i < j: 1 + D + D (D + 1) / 2 of them, since the
    square's other half would only repeat this one. `linear_attention` makes them itself, and keeps them out
    of memory, with `feature_map="taylor"`.

    Source: Based, Arora et al. 2024 (arXiv 2402.18668), where x is q or k over D^(1/4).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> x, y = frugax.layers.taylor(jnp.array([[1.0, 2.0], [3.0, 0.5]]))
        >>> x.shape, round(float(x @ y), 4)  # 1 + 4 + 4^2 / 2
        ((6,), 13.0)
    """
    squares = [x[..., i:] * x[..., i : i + 1] for i in range(x.shape[-1])]
    squares = [jnp.concatenate([s[..., :1] * math.sqrt(0.5), s[..., 1:]], axis=-1) for s in squares]
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, *squares], axis=-1)


class Factors(NamedTuple):
    """The Taylor features as products: feature f is weight[f] z[left[f]] z[right[f]], where z = [1, x]."""

    left: np.ndarray
    right: np.ndarray
    weight: np.ndarray


def factors(width: int) -> Factors:
    """The factors of `taylor`'s features of x [..., width], in its order."""
    pairs = [(0, 0), *((0, i) for i in range(1, width + 1))]
    pairs += [(i, j) for i in range(1, width + 1) for j in range(i, width + 1)]
    left, right = np.array(pairs).T
    return Factors(left, right, np.where((left == right) & (left > 0), math.sqrt(0.5), 1.0))


def widen(x: Array, feature_map: str | None) -> Array:
    """The features [..., F] of q or k; without a map the same array."""
    return x if feature_map is None else taylor(x)


def widened(call: Inputs, feature_map: str | None) -> Inputs:
    """The call with the features of q and k in their place, in memory."""
    return call._replace(q=widen(call.q, feature_map), k=widen(call.k, feature_map))
