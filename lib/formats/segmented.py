"""8 bits whose steps double from octave to octave, 16 an octave: a float's own upper bits, so no table.

Signed is mu-law by segments, as telephones have it (ITU-T G.711): an offset is added to magnitudes, so that
the steps nearest to zero stay even. Unsigned has no offset, and its codes start above zero: a second moment
that was not zero never becomes it.
"""

import jax.numpy as jnp
from jax import Array, lax

from .format import Format

DROPPED = 23 - 4  # bits of a float32's mantissa that codes do not have
ONE = 127 << 4  # the float 1, without them
OFFSET = 2.0**-8
TOP = 1 - 2.0**-5 - OFFSET  # 127 codes above the offset


class Segmented(Format):
    """Signed: 8 octaves of each sign from the offset on. Unsigned: 16 octaves, the last code 1."""

    @property
    def lowest(self) -> int:
        return -127 if self.signed else 0

    @property
    def highest(self) -> int:
        return 127 if self.signed else 255

    @property
    def _zero(self) -> int:
        """The upper bits of the float that code 0 stands for: the offset, or 255 codes below 1."""
        return ONE - (8 << 4) if self.signed else ONE - 255

    def encode(self, x: Array) -> Array:
        if self.signed:
            code = self._nearest(jnp.abs(x) * TOP + OFFSET)
            return jnp.where(x < 0, -code, code)
        return jnp.maximum(self._nearest(x), 0)

    def decode(self, codes: Array) -> Array:
        upper = (jnp.abs(codes) if self.signed else codes) + self._zero
        value = lax.bitcast_convert_type(upper << DROPPED, jnp.float32)
        if not self.signed:
            return value
        value = (value - OFFSET) * (1 / TOP)
        return jnp.where(codes < 0, -value, value)

    def _nearest(self, x: Array) -> Array:
        bits = lax.bitcast_convert_type(x, jnp.int32)
        return ((bits + (1 << (DROPPED - 1))) >> DROPPED) - self._zero
