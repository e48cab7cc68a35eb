"""The interface of element formats: a set of codes, each of which stands for a value."""

import dataclasses

import jax.numpy as jnp
from jax import Array


def floor(x: Array) -> Array:
    """The floor of x >= 0, by casts that every kernel language has."""
    return x.astype(jnp.int32).astype(jnp.float32)


def round_half_away(x: Array) -> Array:
    """The nearest whole number; halves away from zero."""
    return jnp.where(x < 0, -floor(0.5 - x), floor(0.5 + x))


@dataclasses.dataclass(frozen=True)
class Element:
    """Codes and their values, before any scale.

    `encode` and `decode` are elementwise arithmetic without table look-ups, so that they run in any kernel.
    Codes are consecutive integers; but for minifloats, whose codes have a sign bit, a larger code is a larger
    value.

    Attributes:
      name: the name of the element format.
      bits: bits of a code.
      signed: whether negative values have codes; if not, they are encoded as the code nearest to zero.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> int4 = frugax.formats.format_named("int4").element
        >>> int4.lowest, int4.highest, int4.encode(jnp.array([-7.4, 0.0, 3.5])).tolist()
        (-7, 7, [-7, 0, 4])
    """

    name: str
    bits: int
    signed: bool

    @property
    def code_dtype(self):
        """The integer type of unpacked codes."""
        return jnp.int8 if self.lowest < 0 else jnp.uint8

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.lowest + 2**self.bits - 1

    @property
    def largest(self) -> float:
        """The largest magnitude that a code stands for; scales bring a group's largest to it."""
        return 1.0

    def encode(self, x: Array) -> Array:
        """The int32 code of the value nearest to each float32 x."""
        raise NotImplementedError

    def decode(self, codes: Array) -> Array:
        """The float32 value of each int32 code."""
        raise NotImplementedError

    def next(self, codes: Array, up: Array) -> Array:
        """The codes of the next larger values where `up`, else of the next smaller ones; the last stays."""
        return jnp.clip(codes + jnp.where(up, 1, -1), self.lowest, self.highest)

    def encode_stochastic(self, x: Array, uniform: Array) -> Array:
        """Round x to the code just below or above it, at random, so that the decoded value is x on average.

        Args:
          x: float32, within the element's values.
          uniform: uniform random values in [0, 1), of x's shape.
        """
        nearest = self.encode(x)
        value = self.decode(nearest)
        beside = self.next(nearest, x > value)
        gap = self.decode(beside) - value
        away = jnp.where(gap == 0, 0.0, (x - value) / jnp.where(gap == 0, 1.0, gap))
        return jnp.where(uniform < away, beside, nearest)


class Dependent(Element):
    """Codes that alone do not say their values: a format of them has `codes` and `values` of its own."""

    def encode(self, x: Array) -> Array:
        raise ValueError(
            f"format: got {self.name}, in which values have no code each; expected Format.encode"
        )

    def decode(self, codes: Array) -> Array:
        raise ValueError(
            f"format: got {self.name}, in which codes have no value each; expected Format.decode"
        )

    def next(self, codes: Array, up: Array) -> Array:
        raise ValueError(f"format: got {self.name}, in which codes have no value each; expected Format.next")
