"""Ternary values of which each group has its own two: its least, zero, and its greatest."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from .element import Dependent, Element
from .format import Format
from .scales import Scaling

UPPER = 0xFFFF0000  # the bits of a float32 that a bfloat16 has
NO_ENDS = 0x7FC07FC0  # two bfloat16 that are NaN


class Signs(Dependent):
    """-1, 0 and 1 in two bits: a value below zero, zero, and one above.

    Example:
        >>> from frugax.formats import ternary_minmax
        >>> ternary_minmax.element.lowest, ternary_minmax.element.highest
        (-1, 1)
    """

    @property
    def lowest(self) -> int:
        return -1

    @property
    def highest(self) -> int:
        return 1


@dataclasses.dataclass(frozen=True)
class MinMax:
    """The least and the greatest value of a group, zero included: two bfloat16 in the bits of one uint32.

    Attributes:
      rounding: "nearest", or "up": away from zero, so that no value is out of range.

    Source: Frantar & Alistarh 2023, QMoE (arXiv 2310.16795), section 3.2.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> ternary = frugax.formats.ternary_minmax
        >>> low, high = ternary.scheme.ends(ternary.fit(jnp.array([[3.0, 1.0, -0.5, 0.0]])))
        >>> low.tolist(), high.tolist()
        ([-0.5], [3.0])
    """

    rounding: str = "nearest"
    by_group = True

    def fit(self, x: Array, element: Element) -> Scaling:
        low, high = jnp.minimum(jnp.min(x, -1), 0.0), jnp.maximum(jnp.max(x, -1), 0.0)
        return Scaling(self._bits(high) | (self._bits(low) >> 16))

    def covering(self) -> "MinMax":
        return MinMax("up")

    def scale(self, scaling: Scaling) -> Array:
        """1, for values are stored as they are; NaN for a group with an end that is not finite."""
        low, high = self.ends(scaling)
        return jnp.where(jnp.isfinite(low) & jnp.isfinite(high), 1.0, jnp.nan).astype(jnp.float32)

    def ends(self, scaling: Scaling) -> tuple[Array, Array]:
        """The least and the greatest value of each group, float32."""
        stored = scaling.scales
        low, high = stored << 16, stored & jnp.uint32(UPPER)
        return tuple(lax.bitcast_convert_type(bits, jnp.float32) for bits in (low, high))  # type: ignore[return-value]

    def _bits(self, x: Array) -> Array:
        """The bits of x as a bfloat16, in the upper half of a uint32."""
        if self.rounding == "nearest":
            # Not by casts to bfloat16 and back, which XLA leaves out inside of a program.
            x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
            return lax.bitcast_convert_type(x, jnp.uint32)
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        down = bits & jnp.uint32(UPPER)
        return jnp.where((down != bits) & jnp.isfinite(x), down + jnp.uint32(1 << 16), down)


@dataclasses.dataclass(frozen=True)
class TernaryMinMax(Format):
    """Each value of a group is its least, zero or its greatest: the nearest of the three.

    Of normally distributed weights in large groups about nine in ten become zero.

    Source: Frantar & Alistarh 2023, QMoE (arXiv 2310.16795), section 3.2.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> x = jnp.array([3.0, 1.4, 1.6, -0.5, -0.2])
        >>> frugax.formats.quantize(x, "ternary_minmax").dequantize().tolist()
        [3.0, 0.0, 3.0, -0.5, 0.0]
    """

    elementwise = False

    def codes(self, unit: Array, scaling: Scaling, uniform: Array | None = None) -> Array:
        low, high = (end[..., None] for end in self.scheme.ends(scaling))
        if uniform is None:
            above, below = unit > high / 2, unit < low / 2
        else:
            above, below = uniform * high < unit, uniform * low > unit
        return above.astype(jnp.int32) - below.astype(jnp.int32)

    def values(self, codes: Array, scaling: Scaling) -> Array:
        low, high = (end[..., None] for end in self.scheme.ends(scaling))
        return jnp.where(codes > 0, high, jnp.where(codes < 0, low, 0.0))

    def next(self, codes: Array, up: Array, scaling: Scaling) -> Array:
        return jnp.clip(codes + jnp.where(up, 1, -1), -1, 1)


ternary_minmax = TernaryMinMax("ternary_minmax", Signs("ternary_minmax", 2, True), MinMax())
