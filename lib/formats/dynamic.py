"""The dynamic 8-bit formats: seven decades, each with twice the values of the one below.

Decade i of 0..6 is [0.1, 1] * 10^(i-6), cut into 2^i equal cells (2^(i+1) in the unsigned format). A code
stands for the middle of a cell; zero and one have codes of their own. Counted from the smallest magnitude, a
cell's rank is 2^i + cell. A float32 holds that as exponent i and mantissa cell, so no table is needed.

Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).
"""

import jax
import jax.numpy as jnp
from jax import Array

from .element import Element, floor

DECADES = 7


class Dynamic(Element):
    """The dynamic map: zero, 1, and 127 values of each sign or, in the unsigned format, 254 values."""

    @property
    def _zero(self) -> int:
        """The code of zero."""
        return 127 if self.signed else 0

    @property
    def _cells(self) -> int:
        """Cells of the lowest decade."""
        return 1 if self.signed else 2

    def encode(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        magnitude = jnp.abs(x) if self.signed else x
        # Values up to 0.9 of a cell past the end of a decade still round to that decade's last value.
        cells = jnp.full_like(x, self._cells)
        per_unit = jnp.full_like(x, self._cells / 0.9 * 10.0 ** (DECADES - 1))
        for i in range(DECADES - 1):
            n = self._cells * 2**i
            above = magnitude > 10.0 ** (i + 1 - DECADES) * (1 + 0.9 / n)
            cells = jnp.where(above, 2.0 * n, cells)
            per_unit = jnp.where(above, 2 * n / 0.9 * 10.0 ** (DECADES - 2 - i), per_unit)
        cell = jnp.minimum(floor(jnp.maximum(magnitude * per_unit - cells * (1 / 9), 0.0)), cells - 1)
        rank = cells + cell + (1 - self._cells)
        rank = jnp.where(magnitude < (self._smallest + self._least) / 2, 0.0, rank)
        last = 2.0 ** (DECADES - 1) * self._cells
        one = (x if self.signed else magnitude) > 1 - 0.225 / last
        rank = jnp.where(one, 2 * last + (1 - self._cells), rank)
        return (jnp.where(x < 0, -rank, rank) + self._zero).astype(jnp.int32)

    def decode(self, codes: Array) -> Array:
        signed_rank = (codes - self._zero).astype(jnp.float32)
        rank = jnp.abs(signed_rank)
        # 2^i + cell + 1/2 as a float: its exponent is i, its mantissa 1 + (cell + 1/2) / 2^i.
        middle = jax.lax.bitcast_convert_type(rank + (self._cells - 0.5), jnp.int32)
        mantissa = jax.lax.bitcast_convert_type((middle & 0x7FFFFF) | 0x3F800000, jnp.float32)
        decade = jnp.full_like(rank, 10.0 ** (1 - DECADES))
        for i in range(1, DECADES):
            decade = jnp.where(
                rank >= self._cells * 2**i + (1 - self._cells), 10.0 ** (i + 1 - DECADES), decade
            )
        value = decade * (0.1 + 0.9 * (mantissa - 1))
        value = jnp.where(rank == 0, self._least, value)
        value = jnp.where(rank == 2**DECADES * self._cells + (1 - self._cells), 1.0, value)
        return jnp.where(signed_rank < 0, -value, value) if self.signed else value

    @property
    def _smallest(self) -> float:
        return 10.0 ** (1 - DECADES) * (0.1 + 0.45 / self._cells)

    @property
    def _least(self) -> float:
        """The value of the code of zero."""
        return 0.0


class PositiveDynamic(Dynamic):
    """The unsigned dynamic map with half its smallest value in the place of zero, for second moments.

    A moment that becomes zero makes the next updates too large: up to 700 times, measured with Adam on
    gradients below a thousandth of their group's largest.
    """

    @property
    def _least(self) -> float:
        return self._smallest / 2
