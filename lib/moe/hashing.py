"""Routing by a table of the vocabulary: nothing is learned, and no logits are read."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Integer

from .routing import Mask, Routing, check_mask, routing


def hash_route(
    tokens: Integer[Array, "t"], table: Integer[Array, "v"], experts: int, *, mask: Mask = None
) -> Routing:
    """Look each token's expert up in a table of the vocabulary; weights are 1.

    Args:
      tokens: ids. One that the table does not have gets NaN for a weight.
      table: the expert of each id, such as `jax.random.randint(key, (V,), 0, E)`.
      experts: E.
      mask: as in `softmax_top_k`.

    Raises:
      ValueError: tokens or the table are no integers in one row, or mask is not [T].

    Source: Roller et al. 2021, Hash layers (arXiv 2106.04426).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.moe.hash_route(jnp.array([2, 0]), jnp.array([1, 0, 3]), 4).indices.tolist()
        [[3], [1]]
    """
    for name, x in (("tokens", tokens), ("table", table)):
        if x.ndim != 1 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name}: got {x.dtype}{list(x.shape)}; expected integers in one row")
    check_mask(mask, tokens)
    tokens, table = (jnp.asarray(x).astype(jnp.int32) for x in (tokens, table))  # bytes can't count to 256
    found = table.at[tokens].get(mode="clip")
    known = (tokens >= 0) & (tokens < table.shape[0]) & (found >= 0) & (found < experts)
    indices = jnp.clip(found, 0, experts - 1)
    weights = jnp.where(known, 1.0, jnp.nan)[:, None]
    return routing(indices[:, None], weights, jax.nn.one_hot(indices, experts), {}, mask=mask)
