"""Integers on an even grid: symmetric about zero, from zero up, or odd ones alone."""

import jax.numpy as jnp
from jax import Array

from .element import Element, floor, round_half_away


class Integer(Element):
    """n-bit integers. Signed: -h..h with h = 2^(n-1) - 1; unsigned: 0..h with h = 2^n - 1.

    Example:
        >>> from frugax.formats import Integer
        >>> [(f.lowest, f.highest) for f in (Integer("int3", 3, True), Integer("uint3", 3, False))]
        [(-3, 3), (0, 7)]
    """

    @property
    def lowest(self) -> int:
        return -self.highest if self.signed else 0

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    @property
    def largest(self) -> float:
        return float(self.highest)

    def encode(self, x: Array) -> Array:
        nearest = round_half_away(jnp.clip(x.astype(jnp.float32), self.lowest, self.highest))
        return nearest.astype(jnp.int32)

    def decode(self, codes: Array) -> Array:
        return codes.astype(jnp.float32)


class Ternary(Integer):
    """-1, 0 and 1, in two bits.

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax.formats import Ternary
        >>> Ternary("ternary", 2, True).encode(jnp.array([-3.0, 0.4, 0.6])).tolist()
        [-1, 0, 1]
    """

    @property
    def highest(self) -> int:
        return 1


class Bipolar(Element):
    """Every bit plane is -1 or 1: sum_i 2^i (2 b_i - 1), the odd numbers from -(2^n - 1) to 2^n - 1.

    Without an exact zero, and without a sign bit: any bit plane of a matrix is a matrix of signs.

    Source: Ma et al. 2024, Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor
    Cores (arXiv 2409.17870).

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax.formats import Bipolar
        >>> Bipolar("bipolar2", 2, True).decode(jnp.arange(4)).tolist()
        [-3.0, -1.0, 1.0, 3.0]
    """

    @property
    def largest(self) -> float:
        return float(2**self.bits - 1)

    def encode(self, x: Array) -> Array:
        top = self.largest
        return (
            floor((jnp.clip(x.astype(jnp.float32), -top, top) + (top + 1)) * 0.5)
            .astype(jnp.int32)
            .clip(0, self.highest)
        )

    def decode(self, codes: Array) -> Array:
        return codes.astype(jnp.float32) * 2 - self.largest
