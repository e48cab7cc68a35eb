"""The block quantizer f(x) = s Q(x / s) of low-bit training, and its gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from ...formats import Element, RoundedAbsMax
from ...formats.scales import finite_or_nan
from .recipe import SCALES, Recipe
from .rounding import rounding_slope


class Quantized(NamedTuple):
    """Blocks [..., G, g] as elements * scales * outer.

    Attributes:
      elements: float32 [..., G, g], values of the element format.
      scales: float32 [..., G, 1], values of the scale format; ones where the tensor has one scale.
      outer: float32, the tensor's own scale.
    """

    elements: Array
    scales: Array
    outer: Array

    @property
    def inner(self) -> Array:
        """Blocks without the tensor's scale: bfloat16 holds them exactly, unless block scales are float32."""
        return self.elements * self.scales


def quantize_blocks(
    x: Float[Array, "*b G g"],
    element: Element,
    recipe: Recipe,
    *,
    key: Key[Array, ""] | None = None,
    largest: Float[Array, ""] | None = None,
) -> Quantized:
    """Round blocks to an element format under the recipe's scales.

    A block with a NaN or an infinity becomes NaN; with one scale for the tensor all of it, but for `largest`,
    that element alone.

    Args:
      x: float32.
      element: of the codes.
      recipe: says how scales are found; its elements are not read.
      key: rounds at random by it, the scales up; None rounds to the nearest.
      largest: the tensor's largest magnitude, as a history has it; None: x's own.

    Returns:
      Elements, scales of the blocks, and the scale of the tensor.
    """
    if recipe.block_size is None:
        largest = jnp.max(jnp.abs(x)) if largest is None else largest
        outer = finite_or_nan(largest) / element.largest
        scales = jnp.ones((*x.shape[:-1], 1), jnp.float32)
    else:
        amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        outer = _tensor_scale(amax, element, recipe) if recipe.tensor_scale else jnp.float32(1)
        scales = _block_scales(amax / outer, element, recipe, covering=key is not None)
    unit = _units(x, scales * outer)
    if key is None:
        codes = element.encode(unit)
    else:
        codes = element.encode_stochastic(unit, jax.random.uniform(key, x.shape, jnp.float32))
    elements = element.decode(codes)
    if largest is not None:  # a scale of the past knows nothing of a NaN
        elements = jnp.where(jnp.isfinite(x), elements, jnp.nan)
    return Quantized(elements, scales, outer)


def quantizer_vjp(
    x: Float[Array, "*b G g"],
    upstream: Float[Array, "*b G g"],
    element: Element,
    recipe: Recipe,
    *,
    largest: Float[Array, ""] | None = None,
) -> Float[Array, "*b G g"]:
    """Pull a gradient back through f(x) = s Q(x / s), where s is the block's largest magnitude over L.

    With u = x / s, slopes Q' as `recipe.rounding_gradient` says, and rounding of s taken for the identity:

      df_i / dx_j = Q'(u_i) [i = j] + (Q(u_i) - u_i Q'(u_i)) ds / dx_j
      ds / dx_j = sign(x_j) / L where |x_j| is the largest of the block, else 0

    The second term is there with `recipe.scale_gradient`. The largest of several equal elements is all of
    them, in equal parts.

    Args:
      x: the blocks that were rounded to the nearest.
      upstream: the gradient with respect to f(x).
      element: of the codes, with largest value L.
      recipe, largest: as for `quantize_blocks`.

    Source: Hu et al. 2025 (arXiv 2509.17791), proposition 1, which has 1 / s for s and the diagonal i = j.
    """
    q = quantize_blocks(x, element, recipe, largest=largest)
    unit = _units(x, q.scales * q.outer)
    slope = rounding_slope(unit, element, recipe.rounding_gradient)
    gradient = upstream * slope
    if not recipe.scale_gradient:
        return gradient
    axes = None if recipe.block_size is None else -1
    of_scale = jnp.sum(upstream * (q.elements - unit * slope), axis=axes, keepdims=True)
    magnitude = jnp.abs(x)
    is_largest = (magnitude == jnp.max(magnitude, axis=axes, keepdims=True)).astype(jnp.float32)
    share = is_largest / jnp.sum(is_largest, axis=axes, keepdims=True)
    return gradient + of_scale * share * jnp.sign(x) / element.largest


def _tensor_scale(amax: Array, element: Element, recipe: Recipe) -> Array:
    """The scale that brings the largest block scale to the top of the scale format; powers of two to 1."""
    scheme = SCALES[recipe.scale]
    top = scheme.element.largest if isinstance(scheme, RoundedAbsMax) else 1.0
    outer = jnp.max(amax) / element.largest / top
    return jnp.where(outer == 0, 1.0, outer)


def _block_scales(amax: Array, element: Element, recipe: Recipe, *, covering: bool) -> Array:
    """Scales [..., 1] of blocks with these largest magnitudes; `covering`: so that no element saturates."""
    scheme = SCALES[recipe.scale]
    scheme = scheme.covering() if covering else scheme
    scales = scheme.scale(scheme.fit(amax, element))[..., None]
    return jnp.where(jnp.isfinite(amax), scales, jnp.nan)


def _units(x: Array, scale: Array) -> Array:
    """x / scale, and 0 where a scale is, or has become, zero."""
    return jnp.where(scale == 0, 0.0, x / jnp.where(scale == 0, 1.0, scale))
