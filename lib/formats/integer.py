"""Integers on an even grid, symmetric about zero or from zero up."""

import jax.numpy as jnp
from jax import Array

from .format import Format, round_half_away


class Integer(Format):
    """n-bit integers divided by h. Signed: -h..h with h = 2^(n-1) - 1; unsigned: 0..h with h = 2^n - 1."""

    @property
    def lowest(self) -> int:
        return -self.highest if self.signed else 0

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    def encode(self, x: Array) -> Array:
        nearest = round_half_away(x.astype(jnp.float32) * self.highest)
        return jnp.clip(nearest, self.lowest, self.highest).astype(jnp.int32)

    def decode(self, codes: Array) -> Array:
        return codes.astype(jnp.float32) * (1 / self.highest)
