"""Estimators of the loss's slope along a direction, by forward passes alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from .directions import Direction, displace, loss_along


class Estimate(NamedTuple):
    """The result of an estimator."""

    params: Any  # params + offset * direction, so that going back and the update are one addition
    offset: float
    loss: Array  # about params
    slope: Array  # d loss(params + s * direction) / ds


Estimator = Callable[[Callable[[Any], Array], Any, Array, Direction], Estimate]


def opaque_copies(key: Array, n: int) -> Array:
    """n copies of a key that XLA does not know to be the same: it would share their noise, and keep it."""
    return lax.optimization_barrier(jnp.stack([key] * n))


def _scalar(loss_fn: Callable[[Any], Array]) -> Callable[[Any], Array]:
    """loss_fn, or a ValueError where its result is no scalar: params would move by a vector."""

    def checked(params: Any) -> Array:
        loss = loss_fn(params)
        if jax.tree.map(jnp.shape, loss) != ():
            raise ValueError(f"loss_fn: got {jax.tree.map(jax.typeof, loss)}; expected a scalar")
        return loss

    return checked


def two_point(epsilon: float, *, in_place: bool = True) -> Estimator:
    """SPSA: the loss at +epsilon and at -epsilon along the direction.

    Args:
      epsilon: the distance to either side.
      in_place: move the parameters there and back, as MeZO does; what rounding loses stays lost. False: move
        them where the loss reads them, a layer at a time where it scans over layers, and leave the
        parameters exactly as they are.

    Source: Spall 1992; Malladi et al. 2023, MeZO (arXiv 2305.17333).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> e = zo.two_point(1e-2)(lambda w: jnp.sum(w**2), jnp.ones(3), jax.random.key(0), zo.gaussian)
        >>> e.offset, round(float(e.loss), 2)
        (-0.01, 3.0)
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon: got {epsilon}; expected a positive number")

    def estimate(loss_fn, params, key, direction):
        loss_fn = _scalar(loss_fn)

        # A loop of two turns, not two calls: parameters stay in their place. Each turn makes its own noise.
        def move(params, turn):
            amount, key = turn
            # Behind a condition: else XLA would make the noise again in each product of it.
            params = lax.cond(amount != 0, lambda: displace(params, key, amount, direction), lambda: params)
            return params, loss_fn(params)

        def read(_, turn):
            return None, loss_along(loss_fn, params, turn[1], turn[0], direction)

        keys, offset = opaque_copies(key, 2), -epsilon if in_place else 0.0
        if in_place:
            params, losses = lax.scan(move, params, (jnp.array([epsilon, -2 * epsilon]), keys))
        else:
            _, losses = lax.scan(read, None, (jnp.array([epsilon, -epsilon]), keys))
        above, below = losses
        return Estimate(params, offset, (above + below) / 2, (above - below) / (2 * epsilon))

    return estimate


def forward_gradient() -> Estimator:
    """The exact slope, by forward-mode differentiation: one pass of about twice the cost, no residuals.

    Source: Baydin et al. 2022 (arXiv 2202.08587); Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> w, key = jnp.arange(3.0), jax.random.key(0)
        >>> e = zo.forward_gradient()(lambda w: jnp.sum(w**2), w, key, zo.gaussian)
        >>> bool(abs(e.slope - 2 * w @ zo.gaussian(key, 0, "", w)) < 1e-5)
        True
    """

    def estimate(loss_fn, params, key, direction):
        def along(s):
            return loss_along(_scalar(loss_fn), params, key, s, direction, branch=False)

        loss, slope = jax.jvp(along, (jnp.zeros(()),), (jnp.ones(()),))
        return Estimate(params, 0.0, loss, slope)

    return estimate
