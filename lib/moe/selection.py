"""Ways to choose experts by scores: of all, of the best groups, or evenly."""

import numbers

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


def top_k(scores: Float[Array, "t e"], k: int) -> Int[Array, "t k"]:
    """The k experts with the largest scores, best first; of equal ones the first."""
    if isinstance(k, bool) or not isinstance(k, numbers.Integral) or not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"k: got {k}; expected 1 to {scores.shape[-1]}, the number of experts")
    return lax.top_k(lax.stop_gradient(scores), k)[1]


def top_k_of_groups(
    scores: Float[Array, "t e"], k: int, groups: int | None, top_groups: int, best: int
) -> Int[Array, "t k"]:
    """The k experts with the largest scores, of each token's best groups; arguments as in `within_groups`."""
    if groups is None:
        return top_k(scores, k)
    indices = top_k(within_groups(scores, groups, top_groups, best), k)
    most = top_groups * (scores.shape[-1] // groups)
    if k > most:
        raise ValueError(f"k: got {k}; expected 1 to {most}, the experts of top_groups={top_groups}")
    return indices


def within_groups(
    scores: Float[Array, "t e"], groups: int, top_groups: int, best: int
) -> Float[Array, "t e"]:
    """Scores of the experts in each token's best groups; the others' are minus infinity.

    Args:
      scores: of E experts, which lie in `groups` groups of neighbours.
      groups: how many; it divides E.
      top_groups: groups that a token may use.
      best: a group is as good as the sum of its so many best scores.

    Source: DeepSeek-V2 (arXiv 2405.04434, best=1) and V3 (arXiv 2412.19437, best=2).
    """
    T, E = scores.shape
    if groups < 1 or E % groups:
        raise ValueError(f"groups: got {groups}; expected a divisor of {E}, the number of experts")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"top_groups: got {top_groups}; expected 1 to {groups}, the number of groups")
    grouped = scores.reshape(T, groups, -1)
    worth = jnp.sum(lax.top_k(grouped, min(best, E // groups))[0], -1)
    chosen = jnp.sum(jax.nn.one_hot(lax.top_k(worth, top_groups)[1], groups), 1) > 0
    return jnp.where(chosen[:, :, None], grouped, -jnp.inf).reshape(T, E)


def sinkhorn(
    logits: Float[Array, "t e"], *, tolerance: float = 1e-4, iterations: int = 100
) -> Float[Array, "t e"]:
    """Scale exp(logits) by row and column until tokens and experts have even shares; all shares sum to 1.

    Args:
      logits: any; what counts is differences within rows.
      tolerance: the mean change of the columns' scale at which it ends.
      iterations: at most.

    Source: Clark et al. 2022, Unified Scaling Laws for Routed Language Models (arXiv 2202.01169), section B.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> plan = frugax.moe.sinkhorn(jnp.array([[2.0, 0.0], [1.0, 0.0]]))
        >>> [[round(x, 2) for x in row] for row in plan.tolist()]
        [[0.31, 0.19], [0.19, 0.31]]
    """
    T, E = logits.shape
    cost = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))

    def unfinished(carry):
        _, _, change, i = carry
        return (change > tolerance) & (i < iterations)

    def step(carry):
        _, columns, _, i = carry
        rows = 1 / (T * jnp.maximum(cost @ columns, 1e-30))
        new = 1 / (E * jnp.maximum(rows @ cost, 1e-30))
        change = jnp.mean(jnp.abs(new - columns)) / jnp.mean(jnp.abs(new))
        return rows, new, change, i + 1

    start = jnp.ones(T), jnp.ones(E), jnp.asarray(jnp.inf), 0
    rows, columns, _, _ = lax.while_loop(unfinished, step, start)
    return rows[:, None] * cost * columns[None]


def auction(scores: Float[Array, "t e"], *, epsilon: float = 1e-4) -> Int[Array, "t"]:
    """Give each expert the same number of tokens, of nearly the greatest sum of scores that can be.

    Tokens without an expert bid for the place that is worth most to them at its price; the place goes to the
    highest bidder. The sum is within T * epsilon * (the scores' range) of the greatest.

    Args:
      scores: of T tokens and E experts; E divides T.
      epsilon: how much more than needed a bid is, in parts of the scores' range.

    Returns:
      The expert of each token, int32.

    Raises:
      ValueError: E does not divide T.

    Source: Lewis et al. 2021, BASE layers (arXiv 2103.16716), with the auction of Bertsekas 1992.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.moe.auction(jnp.array([[3.0, 0.0], [2.0, 1.9]])).tolist()  # 3 + 1.9 is more than 2 + 0
        [0, 1]
    """
    T, E = scores.shape
    if T % E:
        raise ValueError(
            f"scores: got {T} tokens for {E} experts; expected a multiple, so that shares are even"
        )
    scores = lax.stop_gradient(scores).astype(jnp.float32)
    finite = jnp.isfinite(scores)  # what is not finite is bid for last: the weights will show it
    scores = jnp.where(finite, scores, jnp.min(jnp.where(finite, scores, 0.0)))
    step = epsilon * jnp.maximum(jnp.max(scores) - jnp.min(scores), 1e-6)
    places = T // E  # of each expert; a place's price is what its holder bid

    def bid(carry):
        holder, price, owned = (
            carry  # [E, places] tokens and prices; [T] place of each token, E * places: none
        )
        cheapest = jnp.argmin(price, 1)
        value = scores - jnp.take_along_axis(price, cheapest[:, None], 1).T
        best, second = jnp.moveaxis(lax.top_k(value, 2)[0], -1, 0) if E > 1 else (value[:, 0], value[:, 0])
        want = jnp.argmax(value, 1)
        offer = jnp.where(owned >= T, best - second + step, -jnp.inf)
        # Of each expert's cheapest place: the highest bid of those without one.
        offers = jnp.where(want[:, None] == jnp.arange(E)[None], offer[:, None], -jnp.inf)
        winner, raised = jnp.argmax(offers, 0), jnp.max(offers, 0)
        sold = raised > -jnp.inf
        place = jnp.arange(E) * places + cheapest
        loser = jnp.take_along_axis(holder, cheapest[:, None], 1)[:, 0]
        owned = owned.at[jnp.where(sold, loser, T)].set(T, mode="drop")
        owned = owned.at[jnp.where(sold, winner, T)].set(place, mode="drop")
        at = jnp.arange(E), cheapest
        holder = holder.at[at].set(jnp.where(sold, winner, loser))
        return holder, price.at[at].add(jnp.where(sold, raised, 0.0)), owned

    start = jnp.full((E, places), T), jnp.zeros((E, places)), jnp.full(T, T)
    _, _, owned = lax.while_loop(lambda carry: jnp.any(carry[2] >= T), bid, start)
    return (owned // places).astype(jnp.int32)
