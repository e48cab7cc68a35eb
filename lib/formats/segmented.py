"""8-bit formats with 16 steps an octave, twice as wide in each next octave: codes are a float's upper bits.

The signed format is mu-law by segments, as in telephony (ITU-T G.711): an offset is added to magnitudes, so
that the steps nearest to zero are even. The unsigned format has no offset, and code 0 stands for a value
above zero: a second moment that isn't zero never becomes zero.
"""

import jax.numpy as jnp
from jax import Array, lax

from .element import Element

DROPPED = 23 - 4  # bits of a float32's mantissa that codes leave out
ONE = 127 << 4  # the bits of the float 1, without those
OFFSET = 2.0**-8
TOP = 1 - 2.0**-5 - OFFSET  # 127 codes above the offset


class Segmented(Element):
    """Signed: 8 octaves of each sign, from the offset on. Unsigned: 16 octaves, and the last code is 1."""

    @property
    def lowest(self) -> int:
        return -127 if self.signed else 0

    @property
    def highest(self) -> int:
        return 127 if self.signed else 255

    @property
    def _zero(self) -> int:
        """The upper bits of the float of code 0: the offset if signed, else 255 steps below 1."""
        return ONE - (8 << 4) if self.signed else ONE - 255

    def encode(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        if self.signed:
            code = self._nearest(jnp.abs(x) * TOP + OFFSET)
            return jnp.where(x < 0, -code, code)
        return jnp.maximum(self._nearest(x), 0)

    def decode(self, codes: Array) -> Array:
        codes = codes.astype(jnp.int32)
        upper = (jnp.abs(codes) if self.signed else codes) + self._zero
        value = lax.bitcast_convert_type(upper << DROPPED, jnp.float32)
        if not self.signed:
            return value
        value = (value - OFFSET) * (1 / TOP)
        return jnp.where(codes < 0, -value, value)

    def _nearest(self, x: Array) -> Array:
        bits = lax.bitcast_convert_type(x, jnp.int32)
        return ((bits + (1 << (DROPPED - 1))) >> DROPPED) - self._zero
