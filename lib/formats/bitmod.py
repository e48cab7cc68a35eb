"""A choice of codebook for each group: minifloats with a special value in the place of minus zero.

Source: Chen et al. 2024, BitMoD (arXiv 2411.11745).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from .element import Element
from .format import Format
from .least_squares import order_of_magnitude
from .minifloat import Minifloat
from .scales import Scaling, group_maxima, never_zero


@dataclasses.dataclass(frozen=True)
class SpecialValue(Element):
    """A minifloat in which the code of minus zero stands for another value.

    Attributes:
      base: the minifloat, signed and without NaN.
      special: the value. A middle between it and one of the minifloat's rounds to the latter.

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax.formats import Minifloat, SpecialValue
        >>> five = SpecialValue.of(Minifloat.of(2, 1), 5.0)
        >>> five.decode(five.encode(jnp.array([-4.9, 4.4, 4.9, 5.6]))).tolist()
        [-4.0, 4.0, 5.0, 6.0]
    """

    base: Minifloat
    special: float = 0.0

    @classmethod
    def of(cls, base: Minifloat, special: float) -> "SpecialValue":
        """Build the format of a minifloat and the value that it gets in addition."""
        return cls(f"{base.name}_{special:+g}", base.bits, True, base, special)

    @property
    def largest(self) -> float:
        return max(self.base.largest, abs(self.special))

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest value."""
        return min(-self.base.largest, self.special), max(self.base.largest, self.special)

    @property
    def _code(self) -> int:
        """The code of minus zero."""
        return 1 << (self.bits - 1)

    def encode(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        code = self.base.encode(x)
        code = jnp.where(code == self._code, 0, code)
        nearer = jnp.abs(x - self.special) < jnp.abs(x - self.base.decode(code))
        return jnp.where(nearer, self._code, code)

    def decode(self, codes: Array) -> Array:
        return jnp.where(codes == self._code, self.special, self.base.decode(codes))

    def next(self, codes: Array, up: Array) -> Array:
        """The codes of the next larger values where `up`, else of the next smaller ones; the last stays."""
        half = self._code  # values of codes 0 .. half - 1 grow, those of the other half fall
        e, m = np.divmod(np.arange(half), 1 << self.base.mantissa)
        magnitudes = np.where(e == 0, 2 * m, (m + (1 << self.base.mantissa)) * 2.0**e)  # in half steps
        unit = self.base.largest / magnitudes[-1]
        values = np.concatenate([magnitudes, -magnitudes]) * unit
        values[half] = self.special
        order = np.argsort(values)
        rank = jnp.asarray(np.argsort(order))[codes] + jnp.where(up, 1, -1)
        return jnp.asarray(order)[jnp.clip(rank, 0, len(order) - 1)].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Mixture(Format):
    """A format in which each group has one of several element formats: that of the least squared error.

    The choice takes two bits a group. It is made with exact scales, which bring the largest magnitude to the
    element's; then the scheme stores those of the elements chosen.

    Attributes:
      element: the bits of their codes.
      elements: up to four element formats.
      cover: whether scales bring both ends of the group into the element's range: so no value is cut off, as
        a large one is that lies opposite of the special value, but small ones have fewer digits.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> bitmod4 = frugax.formats.format_named("bitmod4")
        >>> scaling = bitmod4.fit(jnp.array([[6.0, -5.0, 1.0, 0.0], [8.0, -6.0, 1.0, 0.5]]))
        >>> [bitmod4.elements[i].special for i in scaling.choices.tolist()]
        [-5.0, 8.0]
    """

    elements: tuple[SpecialValue, ...] = ()
    cover: bool = False
    elementwise = False

    def fit(self, x: Array) -> Scaling:
        x = x.astype(jnp.float32)
        size = order_of_magnitude(x)[..., None]
        scales, errors = [self._scale(x, element) for element in self.elements], []
        for element, scale in zip(self.elements, scales, strict=True):
            wide = never_zero(scale)[..., None]
            error = (element.decode(element.encode(x / wide)) * wide - x) / size
            errors.append(jnp.sum(error**2, -1))
        choice = jnp.argmin(jnp.stack(errors, -1), -1).astype(jnp.uint8)
        wanted = self._chosen(choice, scales)[..., None]  # as groups of one, with the largest value 1
        return self.scheme.fit(wanted, self.element)._replace(choices=choice)

    def covering(self) -> "Mixture":
        return dataclasses.replace(self, scheme=self.scheme.covering(), cover=True)

    def _scale(self, x: Array, element: SpecialValue) -> Array:
        if not self.cover:
            return group_maxima(x) * (1 / element.largest)
        least, greatest = element.ends
        return jnp.maximum(jnp.max(x, -1) * (1 / greatest), jnp.min(x, -1) * (1 / least))

    def codes(self, unit: Array, scaling: Scaling, uniform: Array | None = None) -> Array:
        if uniform is None:
            codes = [element.encode(unit) for element in self.elements]
        else:
            codes = [element.encode_stochastic(unit, uniform) for element in self.elements]
        return self._chosen(scaling.choices[..., None], codes)

    def values(self, codes: Array, scaling: Scaling) -> Array:
        return self._chosen(scaling.choices[..., None], [element.decode(codes) for element in self.elements])

    def next(self, codes: Array, up: Array, scaling: Scaling) -> Array:
        choices = scaling.choices[..., None]
        return self._chosen(choices, [element.next(codes, up) for element in self.elements])

    def _chosen(self, choice: Array, of_elements: list) -> Array:
        """Pick the chosen element's result."""
        found = jnp.asarray(of_elements[0])
        for i, other in enumerate(of_elements[1:], 1):
            found = jnp.where(choice == i, other, found)
        return found


def _elements(base: Minifloat, specials: tuple[float, ...]) -> tuple[SpecialValue, ...]:
    return tuple(SpecialValue.of(base, special) for special in specials)


# Extra resolution inside of the range, and extra asymmetry beyond it.
BITMOD3 = _elements(Minifloat.of(2, 0), (3.0, -3.0, 6.0, -6.0))
BITMOD4 = _elements(Minifloat.of(2, 1), (5.0, -5.0, 8.0, -8.0))
