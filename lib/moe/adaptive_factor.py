"""The factor of a sparsity loss that follows the loss itself: up where it grows, down where it falls."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class FactorState(NamedTuple):
    """The state that an `AdaptiveFactor` carries from step to step.

    Attributes:
      factor: for the next step.
      step: how many losses were seen, int32.
      start, goal: of this interval; the factor goes from one to the other in a straight line.
      total: of this interval's losses.
      before: the mean loss of the interval before; 0: there was none.

    Example:
        >>> import frugax
        >>> float(frugax.moe.AdaptiveFactor(0.5, stable=4, interval=2).init().factor)
        0.5
    """

    factor: Float[Array, ""]
    step: Int[Array, ""]
    start: Float[Array, ""]
    goal: Float[Array, ""]
    total: Float[Array, ""]
    before: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class AdaptiveFactor:
    """A factor that keeps a loss from growing again: r is the loss's mean over that of the interval before.

    Until `stable` steps the factor is constant. Then each interval has a new goal, r times the factor,
    at least `rise` times it where r > 1, and never above `most` times the first factor. It is reached in a
    straight line at the interval's end. An interval whose mean is 0, or not finite, moves nothing.

    Attributes:
      first: the factor at the start.
      stable: steps before it first moves, two intervals at least.
      interval: steps whose losses are compared.
      rise: the least that the factor grows by where the loss grew.
      most: the limit, in parts of `first`.

    Raises:
      ValueError: a number can't be right.

    Source: Song et al. 2025, BlockFFN (arXiv 2507.08771), as in its code, for `chunk_sparsity`: 0.05, 1000
    steps, 100, 1.025 and 4 there, with a constant factor of 0.002 (0.001 for 0.8B) for `activation_locality`,
    both of losses averaged over layers, with chunks of 64.

    Example:
        >>> import frugax
        >>> schedule = frugax.moe.AdaptiveFactor(1.0, stable=4, interval=2)
        >>> state = schedule.init()
        >>> for loss in (1.0, 1.0, 2.0, 2.0, 0.5, 0.5):
        ...     state = schedule.update(state, loss)
        >>> float(state.goal)  # the loss doubled, and so did the factor; then it fell to a quarter
        0.5
    """

    first: float
    stable: int = 1000
    interval: int = 100
    rise: float = 1.025
    most: float = 4.0

    def __post_init__(self):
        for name, least in (("interval", 1), ("stable", 2 * self.interval), ("rise", 1), ("most", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a number >= {least}")
        if self.interval != int(self.interval) or self.stable != int(self.stable):
            got = f"interval, stable: got {self.interval}, {self.stable}"
            raise ValueError(f"{got}; expected whole numbers of steps")
        if not 0 < self.first < float("inf"):
            raise ValueError(f"first: got {self.first}; expected a number above 0")

    def init(self) -> FactorState:
        """The state before the first step."""
        first, zero = jnp.float32(self.first), jnp.float32(0)
        return FactorState(first, jnp.int32(0), first, first, zero, zero)

    def update(self, state: FactorState, loss: Float[Array, ""] | float) -> FactorState:
        """Take the unscaled loss of a step in, which was scaled by `state.factor`."""
        if jnp.shape(loss) != ():
            raise ValueError(f"loss: got {list(jnp.shape(loss))}; expected a scalar")
        step, total = state.step + 1, state.total + jnp.asarray(loss, jnp.float32)
        ends = step % self.interval == 0
        mean = total / self.interval
        counts = jnp.isfinite(mean) & (mean > 0)
        known = counts & (state.before > 0)  # the first interval has none before it
        ratio = jnp.where(known, mean / jnp.where(known, state.before, 1.0), 1.0)
        ratio = jnp.where(ratio > 1, jnp.maximum(ratio, self.rise), ratio)
        moved = jnp.minimum(ratio * state.factor, self.first * self.most)
        moves = ends & (step >= self.stable)
        start = jnp.where(moves, state.factor, state.start)
        goal = jnp.where(moves, moved, state.goal)
        passed = (step % self.interval + 1) / self.interval
        return FactorState(
            factor=start + (goal - start) * passed,
            step=step,
            start=start,
            goal=goal,
            total=jnp.where(ends, 0.0, total),
            before=jnp.where(ends & counts, mean, state.before),
        )
