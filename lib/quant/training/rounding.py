"""The derivative of rounding: 1, or that of a curve that comes near the staircase."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ...formats import Element

POWER = 5  # k of the power curve, and the bound of its slope, which is infinite in the middle
STEEPEST = 3.0


def curve(t: Float[Array, "*s"], name: str) -> Float[Array, "*s"]:
    """The step from 0 to 1 over t in [0, 1], as a curve: its derivative takes the place of rounding's.

    Args:
      t: the place between two neighbouring values.
      name: "power", 1/2 + sign(2t - 1) |2t - 1|^(1/5) / 2; or "spline", the cubic 3t^2 - 2t^3.

    Source: Wang et al. 2025 (arXiv 2501.17116) for the power, as the differentiable estimator.
    """
    if name == "power":
        return 0.5 + 0.5 * jnp.sign(2 * t - 1) * jnp.abs(2 * t - 1) ** (1 / POWER)
    return 3 * t**2 - 2 * t**3


def rounding_slope(unit: Float[Array, "*s"], element: Element, name: str) -> Float[Array, "*s"]:
    """Q'(u), where Q rounds to the nearest value of an element format.

    Args:
      unit: u, float32.
      element: the format.
      name: "straight_through": 1 for every u. "power" or "spline": the slope of `curve` between the two
        values beside u, and 0 beyond the largest.

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax.formats import Minifloat
        >>> rounding_slope(jnp.array([2.0, 2.5, 7.0]), Minifloat.of(2, 1), "spline").tolist()
        [0.0, 1.5, 0.0]
    """
    if name == "straight_through":
        return jnp.ones_like(unit)
    nearest = element.encode(unit)
    value = element.decode(nearest)
    beside = element.decode(element.next(nearest, unit > value))
    gap = jnp.abs(beside - value)
    from_nearest = jnp.abs(unit - value) / jnp.where(
        gap == 0, 1.0, gap
    )  # 0 to 1/2; both curves are symmetric
    if name == "power":
        distance = jnp.maximum(jnp.abs(2 * from_nearest - 1), 1e-6)
        slope = jnp.minimum(distance ** (1 / POWER - 1) / POWER, STEEPEST)
    else:
        slope = 6 * from_nearest * (1 - from_nearest)
    return jnp.where(gap == 0, 0.0, slope)
