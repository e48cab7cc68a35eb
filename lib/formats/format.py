"""The interface of number formats: an ordered set of codes, each of which stands for a value in [-1, 1]."""

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
class Format:
    """Codes for values in [-1, 1]; `quantize` divides each group by its largest magnitude first.

    Codes are consecutive integers, and a larger code is a larger value. `encode` and `decode` are elementwise
    arithmetic without table look-ups, so that they run in any kernel.

    Attributes:
      name: the name that `frugax.formats.quantize` takes.
      bits: bits of a code.
      signed: whether negative values have codes; if not, they are encoded as the code nearest to zero.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> int4 = frugax.formats.format_named("int4")
        >>> int4.lowest, int4.highest, int4.encode(jnp.array([-1.0, 0.0, 0.5])).tolist()
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

    def encode(self, x: Array) -> Array:
        """The int32 code of the value nearest to each float32 x."""
        raise NotImplementedError

    def decode(self, codes: Array) -> Array:
        """The float32 value of each int32 code."""
        raise NotImplementedError

    def encode_stochastic(self, x: Array, uniform: Array) -> Array:
        """Round x to the code just below or above it, at random, so that the decoded value is x on average.

        Args:
          x: float32 in [-1, 1].
          uniform: uniform random values in [0, 1), of x's shape.
        """
        nearest = self.encode(x)
        value = self.decode(nearest)
        up = x > value
        beside = jnp.clip(nearest + jnp.where(up, 1, -1), self.lowest, self.highest)
        gap = self.decode(beside) - value
        away = jnp.where(gap == 0, 0.0, (x - value) / jnp.where(gap == 0, 1.0, gap))
        return jnp.where(uniform < away, beside, nearest)
