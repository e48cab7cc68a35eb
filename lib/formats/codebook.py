"""Any set of values, such as the quantiles of a normal distribution."""

import dataclasses
import itertools

import jax.numpy as jnp
from jax import Array

from .element import Element


@dataclasses.dataclass(frozen=True)
class Codebook(Element):
    """The values of a sorted table; code i stands for the i-th. A middle rounds down.

    Attributes:
      values: strictly increasing, 2 to 256 of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax.formats import Codebook
        >>> powers = Codebook.of("powers", [-4, -2, -1, 0, 1, 2, 4, 8])
        >>> powers.bits, powers.encode(jnp.array([3.5, -9.0])).tolist()
        (3, [6, 0])
    """

    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str, values) -> "Codebook":
        """Build the format of a table of values.

        Raises:
          ValueError: values are fewer than 2, more than 256, or not strictly increasing.
        """
        values = tuple(float(v) for v in values)
        if not 2 <= len(values) <= 256 or any(b <= a for a, b in itertools.pairwise(values)):
            raise ValueError(f"values: got {values}; expected 2 to 256, each larger than the one before")
        return cls(name, (len(values) - 1).bit_length(), values[0] < 0, values)

    @property
    def highest(self) -> int:
        return len(self.values) - 1

    @property
    def largest(self) -> float:
        return max(abs(self.values[0]), abs(self.values[-1]))

    def encode(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        middles = [(a + b) / 2 for a, b in itertools.pairwise(self.values)]
        if len(middles) > 16:
            return jnp.searchsorted(jnp.asarray(middles, jnp.float32), x).astype(jnp.int32)
        code = jnp.zeros(x.shape, jnp.int32)
        for middle in middles:
            code = code + (x > middle).astype(jnp.int32)
        return code

    def decode(self, codes: Array) -> Array:
        if len(self.values) > 16:
            return jnp.asarray(self.values, jnp.float32)[codes]
        # A tree of choices by the bits of the code, lowest bit first.
        level = [jnp.full(codes.shape, v, jnp.float32) for v in self.values]
        for bit in range(self.bits):
            odd = ((codes >> bit) & 1) == 1
            pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
            level = [p[0] if len(p) == 1 else jnp.where(odd, p[1], p[0]) for p in pairs]
        return level[0]


# The quantiles of N(0, 1) that divide each side evenly, 8 positive and 7 negative ones, and zero; over the
# largest. Computed as the paper says: quantiles of linspace(offset, 1/2, n) with offset = 0.9677083.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
