"""Floating-point numbers of 3 to 8 bits, with subnormals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .element import Element


@dataclasses.dataclass(frozen=True)
class Minifloat(Element):
    """A sign (if signed), `exponent` bits and `mantissa` bits: codes are the number's bits, as in OCP MX.

    x rounds to the nearest value, ties to the even code, and saturates: there are no infinities, but for
    those of codes that come from elsewhere.

    Attributes:
      exponent, mantissa: bits of each, at least one of the exponent's.
      bias: of the exponent; None: 2^(exponent - 1) - 1.
      reserved: codes at the top of each sign that stand for no number: 0; 1, a NaN (e4m3); or 2^mantissa,
        infinity and NaNs as in IEEE 754 (e5m2).

    Source: OCP Microscaling Formats (MX) Specification 1.0, section 5.3.

    Example:
        >>> from frugax.formats import Minifloat
        >>> Minifloat.of(3, 2).name, Minifloat.of(3, 2).largest
        ('fp6_e3m2', 28.0)
    """

    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    reserved: int = 0

    @classmethod
    def of(
        cls, exponent: int, mantissa: int, *, bias: int | None = None, reserved: int = 0, signed: bool = True
    ) -> "Minifloat":
        """Build the format of these bits, named as "fp6_e3m2" is.

        Raises:
          ValueError: no exponent, or more than 8 bits in all.
        """
        bits = signed + exponent + mantissa
        if exponent < 1 or mantissa < 0 or not 2 <= bits <= 8:
            raise ValueError(
                f"exponent, mantissa: got {exponent}, {mantissa}; expected exponent >= 1, 2 to 8 bits in all"
            )
        usual = 2 ** (exponent - 1) - 1
        if bias is not None and not -60 <= bias <= 100:
            raise ValueError(f"bias: got {bias}; expected -60..100")
        name = f"{'fp' if signed else 'ufp'}{bits}_e{exponent}m{mantissa}"
        name += "" if bias in (None, usual) else f"b{bias}"
        return cls(name, bits, signed, exponent, mantissa, usual if bias is None else bias, reserved)

    @property
    def largest(self) -> float:
        return self._value(self._top)

    @property
    def _top(self) -> int:
        """The magnitude bits of the largest number."""
        return 2 ** (self.exponent + self.mantissa) - 1 - self.reserved

    @property
    def _sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)

    def _value(self, magnitude: int) -> float:
        e, m = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        if e == 0:
            return m * 2.0 ** (1 - self.bias - self.mantissa)
        return (1 + m * 2.0**-self.mantissa) * 2.0 ** (e - self.bias)

    def encode(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        a = jnp.minimum(jnp.abs(x), self.largest) if self.signed else jnp.clip(x, 0.0, self.largest)
        bits = lax.bitcast_convert_type(a, jnp.int32)
        dropped = 23 - self.mantissa
        even = bits + ((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
        normal = (even >> dropped) - ((127 - self.bias) << self.mantissa)
        # Added to a power of two whose last bit is one subnormal step, a small number is rounded by the sum.
        step = 2.0 ** (1 - self.bias - self.mantissa)
        shifted = lax.bitcast_convert_type(a + step * 2.0**23, jnp.int32)
        subnormal = shifted - _bits(step * 2.0**23)
        magnitude = jnp.where(a < 2.0 ** (1 - self.bias), subnormal, normal)
        return jnp.where(x < 0, magnitude + self._sign, magnitude) if self.signed else magnitude

    def decode(self, codes: Array) -> Array:
        codes = codes.astype(jnp.int32)
        magnitude = codes & (self._sign - 1)
        normal = lax.bitcast_convert_type(
            (magnitude << (23 - self.mantissa)) + ((127 - self.bias) << 23), jnp.float32
        )
        subnormal = magnitude.astype(jnp.float32) * 2.0 ** (1 - self.bias - self.mantissa)
        value = jnp.where(magnitude < 1 << self.mantissa, subnormal, normal)
        if self.reserved:
            value = jnp.where(magnitude > self._top, jnp.nan, value)
        if self.reserved == 1 << self.mantissa:
            value = jnp.where(magnitude == self._top + 1, jnp.inf, value)
        return jnp.where(codes >= self._sign, -value, value) if self.signed else value

    def next(self, codes: Array, up: Array) -> Array:
        magnitude = codes & (self._sign - 1)
        rank = jnp.where(codes >= self._sign, -magnitude, magnitude) + jnp.where(up, 1, -1)
        if not self.signed:
            return jnp.clip(rank, 0, self._top)
        return jnp.minimum(jnp.abs(rank), self._top) + jnp.where(rank < 0, self._sign, 0)


def _bits(x: float) -> int:
    return int(np.float32(x).view(np.int32))
