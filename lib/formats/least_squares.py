"""The scale of the least squared error, found by trying some."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from .element import Element
from .scales import AbsMax, Scaling, finite_or_nan, group_maxima, never_zero


@dataclasses.dataclass(frozen=True)
class LeastSquares(AbsMax):
    """The scale with the least squared error, of `steps` from `least` times that of `AbsMax` up to it.

    Example:
        >>> import frugax, jax
        >>> from frugax.formats import Format, LeastSquares
        >>> x, plain = jax.random.normal(jax.random.key(0), (256,)), frugax.formats.format_named("int3")
        >>> searched = Format("searched", plain.element, LeastSquares())
        >>> error = lambda f: ((frugax.formats.quantize(x, f).dequantize() - x) ** 2).sum()
        >>> bool(error(searched) < error(plain))
        True
    """

    steps: int = 32
    least: float = 0.5

    def covering(self) -> AbsMax:
        return AbsMax(self.dtype)

    def fit(self, x: Array, element: Element) -> Scaling:
        full = group_maxima(x) * (1 / element.largest)

        def scale(i):
            tried = full * (1 - (1 - self.least) * i / max(self.steps - 1, 1))
            return finite_or_nan(tried.astype(self.dtype))

        return Scaling(least_squares(x, scale, self.steps, lambda unit: element.decode(element.encode(unit))))


def least_squares(
    x: Array, scale: Callable[[Any], Array], steps: int, rounded: Callable[[Array], Array]
) -> Array:
    """Find the scale [..., G] of each group of x [..., G, g] with the least squared error.

    Args:
      x: the groups.
      scale: gives the scales to try at step i of `steps`; step 0's stay where none has a finite error.
      rounded: the values to which x over its scale is rounded.
    """

    def attempt(i, best):
        least_error, best_scale = best
        tried = scale(i)
        wide = tried.astype(jnp.float32)[..., None]
        error = jnp.sum(((rounded(x / never_zero(wide)) * wide - x) / size) ** 2, -1)
        better = error < least_error
        return jnp.where(better, error, least_error), jnp.where(better, tried, best_scale)

    size = order_of_magnitude(x)[..., None]
    first = scale(0)
    return lax.fori_loop(0, steps, attempt, (jnp.full(first.shape, jnp.inf, jnp.float32), first))[1]


def order_of_magnitude(x: Array) -> Array:
    """The power of two below each group's largest magnitude: errors over it have squares in float32's range.

    As a power of two it rounds nothing, so that equal errors stay equal.
    """
    bits = lax.bitcast_convert_type(group_maxima(x), jnp.int32)
    return never_zero(lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32))
