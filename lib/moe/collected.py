"""Sums over layers of what `frugax.layers.MoE` reports in the collection "moe"."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def total_loss(collection: Mapping[str, Any], weights: Mapping[str, float | Array] | None = None) -> Array:
    """Add up the auxiliary losses of all layers: what training adds to its loss.

    Args:
      collection: "moe", or the variables that have it, as `apply(..., mutable=["moe"])` returns them.
      weights: factors of losses by name, in place of the layers' `loss_weights`: they may change from step to
        step, as those of an `AdaptiveFactor` do. A loss without a factor is not added, and of a layer that
        was called several times only the last call is.

    Returns:
      A scalar; 0 without such layers.

    Raises:
      ValueError: no layer has a loss of that name.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> float(frugax.moe.total_loss({"layer": {"loss": jnp.array([0.5, 0.25])}}))  # of two, in a scan
        0.75
    """
    if weights is None:
        return sum((jnp.sum(value) for value in _find(collection, "loss")), jnp.zeros(()))
    losses = [x["losses"] for x in _find(collection, "statistics")]
    for name in weights:
        if losses and not any(name in x for x in losses):
            there_are = ", ".join(sorted({name for x in losses for name in x})) or "none"
            raise ValueError(f"weights: got {name!r}; expected losses of the layers: {there_are}")
    terms = (w * jnp.sum(x[name]) for x in losses for name, w in weights.items() if name in x)
    return sum(terms, jnp.zeros(()))


def load_summary(collection: Mapping[str, Any]) -> dict[str, Array]:
    """Average over layers how even loads are, what is dropped, and how many experts tokens have.

    Args:
      collection: as in `total_loss`.

    Returns:
      "load_entropy" (1 where loads are even), "dropped_share" of assignments, "unrouted_share" of tokens, and
      "active_experts" of a token; empty without such layers.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.MoE(experts=4, k=1), jax.random.normal(jax.random.key(0), (1, 8, 4))
        >>> variables = layer.init(jax.random.key(1), x)
        >>> y, sown = layer.apply(variables, x, mutable=["moe"])
        >>> sorted(frugax.moe.load_summary(sown))
        ['active_experts', 'dropped_share', 'load_entropy', 'unrouted_share']
    """
    found = list(_find(collection, "statistics"))
    if not found:
        return {}
    values = {
        "load_entropy": [x["routing"].entropy for x in found],
        "dropped_share": [x["dropped"] for x in found],
        "unrouted_share": [x["routing"].unrouted for x in found],
        "active_experts": [x["active"] for x in found],
    }
    return {name: jnp.mean(jnp.stack(jax.tree.map(jnp.mean, x))) for name, x in values.items()}


def _find(tree: Mapping[str, Any], name: str) -> Iterator[Any]:
    for key, value in tree.items():
        if key == name:
            yield value
        elif isinstance(value, Mapping):
            yield from _find(value, name)
