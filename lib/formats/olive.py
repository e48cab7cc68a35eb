"""Outlier-victim pairs: an outlier takes the place of its neighbour as well, which becomes zero.

Two neighbours along the quantized axis are two integers of n bits. Where one is an outlier, the other's code
is the identifier -2^(n-1), which no integer has, and the outlier's n bits are an abfloat: a sign, an exponent
and a mantissa, the range of which begins where the integers' ends. So no list of outliers is stored.

Source: Guo et al. 2023, OliVe (arXiv 2304.07493).
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from .element import Dependent
from .format import Format
from .integer import Integer
from .least_squares import least_squares
from .scales import AbsMax, Scaling

EXPONENT = 2  # bits of an abfloat's exponent


@dataclasses.dataclass(frozen=True)
class OutlierVictim(Dependent):
    """The codes of one of a pair: an integer, an abfloat or the identifier; its neighbour says which.

    Abfloats of 4 bits are +-12, 16, 24, 32, 48, 64 and 96; of 8 bits +-132 to 2016, 32 steps an octave.
    """

    @property
    def lowest(self) -> int:
        """The identifier."""
        return -(2 ** (self.bits - 1))

    @property
    def largest(self) -> float:
        return self.integer.largest

    @property
    def integer(self) -> Integer:
        """The element format of pairs without an outlier."""
        return Integer(f"int{self.bits}", self.bits, True)

    @property
    def _dropped(self) -> int:
        """Bits of a float32's mantissa that an abfloat leaves out."""
        return 23 - (self.bits - 1 - EXPONENT)

    def encode_outlier(self, x: Array) -> Array:
        """The code of the abfloat nearest to each float32 x."""
        bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
        upper = (bits + (1 << (self._dropped - 1))) >> self._dropped
        magnitude = jnp.clip(upper - (self._first >> self._dropped), 1, self.highest)
        return jnp.where(x < 0, magnitude + self.lowest, magnitude)

    def decode_outlier(self, codes: Array) -> Array:
        """The float32 value of each abfloat."""
        bits = ((codes.astype(jnp.int32) & self.highest) << self._dropped) + self._first
        value = lax.bitcast_convert_type(bits, jnp.float32)
        return jnp.where(codes < 0, -value, value)

    @property
    def _first(self) -> int:
        """The bits of the float32 at which abfloats begin, 2^(n-1): its code would be 0 and is left out."""
        return (127 + self.bits - 1) << 23


@dataclasses.dataclass(frozen=True)
class SigmaSearch(AbsMax):
    """The scale of the least squared error: that of `AbsMax`, or one around three standard deviations.

    The largest integer then stands for a share of |mean| + 3 sigma, from `most` down to `least` in equal
    ratios; what is much larger is an outlier. The authors try 0.75 to 1.5; in a short group one outlier can
    raise sigma far above all others.
    """

    steps: int = 32
    least: float = 0.1
    most: float = 1.5

    def covering(self) -> AbsMax:
        return AbsMax(self.dtype)


class Pairs(Format):
    """A format of outlier-victim pairs. Each pair is stored in the way that has the least squared error.

    Without outliers its codes are those of the integers of as many bits.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> x = jnp.array([7.0, -7.0, 64.0, 0.0, 1.0, 3.0, 2.0, -5.0])
        >>> q = frugax.formats.quantize(x, "olive4")
        >>> q.unpacked().tolist()
        [5, -5, 5, -8, 1, 2, 1, -4]
        >>> [round(v, 1) for v in q.dequantize().tolist()]
        [6.8, -6.8, 65.3, 0.0, 1.4, 2.7, 1.4, -5.4]
    """

    element: OutlierVictim
    elementwise = False
    paired = True

    def fit(self, x: Array) -> Scaling:
        scheme, x = self.scheme, x.astype(jnp.float32)
        full = scheme.fit(x, self.element)
        if not isinstance(scheme, SigmaSearch):
            return full
        sigmas = jnp.abs(jnp.mean(x, -1)) + 3 * jnp.std(x, -1)

        def scale(i):
            share = scheme.most * (scheme.least / scheme.most) ** ((i - 1) / max(scheme.steps - 2, 1))
            near = (sigmas * (share * (1 / self.element.largest))).astype(scheme.dtype)
            return jnp.where(i == 0, full.scales, jnp.minimum(near, full.scales))

        return Scaling(least_squares(x, scale, scheme.steps, lambda unit: self.values(self.codes(unit))))

    def codes(self, unit: Array, scaling: Scaling | None = None, uniform: Array | None = None) -> Array:
        element, (a, b) = self.element, self._halves(unit)
        integers = element.integer.encode(unit)
        if uniform is not None:
            largest = element.largest
            integers = element.integer.encode_stochastic(jnp.clip(unit, -largest, largest), uniform)
        # Squared errors of a pair as two integers, and with either as an outlier.
        error = self._halves((element.integer.decode(integers) - unit) ** 2)
        outliers = element.encode_outlier(unit)
        first, second = self._halves((element.decode_outlier(outliers) - unit) ** 2)
        plain, first, second = error[0] + error[1], first + b * b, second + a * a
        first_out = (first < plain) & (first <= second)
        second_out = (second < plain) & ~first_out
        (ia, ib), (oa, ob) = self._halves(integers), self._halves(outliers)
        victim = element.lowest
        return self._joined(
            jnp.where(first_out, oa, jnp.where(second_out, victim, ia)),
            jnp.where(second_out, ob, jnp.where(first_out, victim, ib)),
        )

    def values(self, codes: Array, scaling: Scaling | None = None) -> Array:
        victim = codes == self.element.lowest
        neighbour = self._joined(*self._halves(victim)[::-1])
        value = jnp.where(neighbour, self.element.decode_outlier(codes), self.element.integer.decode(codes))
        return jnp.where(victim, 0.0, value)

    def _halves(self, x: Array) -> tuple[Array, Array]:
        """The first and the second of each pair along the last axis."""
        if x.shape[-1] % 2:
            raise ValueError(
                f"group_size: got {x.shape[-1]}; expected an even number: {self.name} stores pairs"
            )
        x = x.reshape(*x.shape[:-1], -1, 2)
        return x[..., 0], x[..., 1]

    def _joined(self, first: Array, second: Array) -> Array:
        return jnp.stack([first, second], -1).reshape(*first.shape[:-1], -1)
