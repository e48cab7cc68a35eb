"""A router's results as values: assignments of tokens to experts, weights, losses and statistics."""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

Mask = Bool[Array, "t"] | None


class RoutingStatistics(NamedTuple):
    """The evenness of a router's use of its experts.

    Attributes:
      load: assignments of each expert over those of all, [E].
      importance: the mean score of each expert over tokens, [E].
      entropy: of the load, over log E: 1 where all experts have the same load.
      unrouted: the share of tokens without an expert.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> statistics = frugax.moe.softmax_top_k(jnp.eye(2), 1).statistics
        >>> statistics.load.tolist(), float(statistics.entropy), float(statistics.unrouted)
        ([0.5, 0.5], 1.0, 0.0)
    """

    load: Float[Array, "e"]
    importance: Float[Array, "e"]
    entropy: Float[Array, ""]
    unrouted: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Assignments of tokens to experts. One with weight 0 is none: its expert does not see the token.

    Attributes:
      indices: where tokens choose, the experts [T, k] of each token; where experts choose, the tokens [E, c]
        of each expert. int32.
      weights: of each assignment, float32, in indices' shape.
      losses: auxiliary losses by name, scalars that a trainer scales and adds.
      statistics: of the load.
      experts: how many there are.
      by: who chooses, "token" or "expert".

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.expert_choice(jnp.array([[2.0, 0.0], [1.0, 0.0]]), capacity=1)
        >>> tokens, experts, weights = routing.assignments()
        >>> tokens.tolist(), experts.tolist()
        ([0, 1], [0, 1])
    """

    indices: Any
    weights: Any
    losses: dict[str, Any]
    statistics: RoutingStatistics
    experts: int = dataclasses.field(metadata=dict(static=True))
    by: str = dataclasses.field(default="token", metadata=dict(static=True))

    def assignments(self) -> tuple[Int[Array, "n"], Int[Array, "n"], Float[Array, "n"]]:
        """Tokens, experts and weights of all assignments, in the order of the indices."""
        return _assignments(self.indices, self.weights, self.by)

    def dense_weights(self, tokens: int) -> Float[Array, "t e"]:
        """The weight of each of so many tokens for each expert; 0 where the expert has no part."""
        token, expert, weight = self.assignments()
        return jnp.zeros((tokens, self.experts), weight.dtype).at[token, expert].add(weight)


def routing(
    indices: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    scores: Float[Array, "t e"],
    losses: dict[str, Array],
    *,
    mask: Array | None,
    by: str = "token",
) -> Routing:
    """Put a `Routing` together, with its statistics; tokens that `mask` leaves out have weight 0."""
    T, E = scores.shape
    indices, weights = indices.astype(jnp.int32), weights.astype(jnp.float32)
    if mask is not None:
        weights = jnp.where(mask[:, None] if by == "token" else mask[indices], weights, 0.0)
    tokens, experts, weight = _assignments(indices, weights, by)
    used = (weight != 0).astype(jnp.float32)
    load = jnp.zeros(E).at[experts].add(used)
    load = load / jnp.maximum(load.sum(), 1)
    real = jnp.ones(T) if mask is None else mask.astype(jnp.float32)
    served = jnp.minimum(jnp.zeros(T).at[tokens].add(used), 1)
    statistics = RoutingStatistics(
        load=load,
        importance=masked_mean(scores, mask),
        entropy=-jnp.sum(load * jnp.log(jnp.where(load > 0, load, 1.0))) / jnp.log(max(E, 2)),
        unrouted=1 - jnp.sum(served * real) / jnp.maximum(real.sum(), 1),
    )
    return Routing(indices, weights, losses, jax.lax.stop_gradient(statistics), E, by)


def masked_mean(x: Array, mask: Array | None, axis_name: str | tuple[str, ...] = ()) -> Array:
    """The mean over tokens, the first axis, that `mask` has; `axis_name`: over those of all its devices."""
    if mask is None:
        mean = jnp.mean(x, 0)
        return jax.lax.pmean(mean, axis_name) if axis_name else mean
    real = mask.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    total, count = jnp.sum(jnp.where(real > 0, x, 0.0), 0), jnp.sum(real)
    if axis_name:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def check_logits(logits: Array, mask: Mask) -> None:
    """Raise ValueError unless logits are floats [T, E] with an expert and a token, and mask is [T]."""
    if logits.ndim != 2 or 0 in logits.shape or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits: got {logits.dtype}{list(logits.shape)}; expected floats [tokens, experts]")
    check_mask(mask, logits)


def check_mask(mask: Mask, tokens: Array) -> None:
    """Raise ValueError unless mask is [T], for tokens [T, ...]."""
    if mask is not None and mask.shape != tokens.shape[:1]:
        raise ValueError(f"mask: got {list(mask.shape)}; expected {[*tokens.shape[:1]]}, one for each token")


def tokens_an_expert(capacity: int | float, mean: float, most: int | float = math.inf) -> int:
    """Count tokens of a capacity: a whole number as it is, a float as a factor of the mean, rounded up."""
    whole = isinstance(capacity, numbers.Integral)
    if isinstance(capacity, bool) or not isinstance(capacity, numbers.Real) or not math.isfinite(capacity):
        got = f"capacity: got {capacity!r}"
        raise ValueError(f"{got}; expected a number of tokens >= 1, or a finite float above 0, of the mean")
    count = int(capacity) if whole else math.ceil(capacity * mean)
    if not 1 <= count <= most:
        expected = "at least 1" if most == math.inf else f"1 to {most} tokens"
        raise ValueError(f"capacity: got {capacity}, {count} tokens an expert; expected {expected}")
    return count


def _assignments(indices: Array, weights: Array, by: str) -> tuple[Array, Array, Array]:
    rows = jnp.broadcast_to(jnp.arange(indices.shape[0])[:, None], indices.shape).reshape(-1)
    columns = indices.reshape(-1)
    tokens, experts = (rows, columns) if by == "token" else (columns, rows)
    return tokens.astype(jnp.int32), experts.astype(jnp.int32), weights.reshape(-1)
