"""Table look-up for 8-bit formats: faster than arithmetic where a cache holds the tables, as on a CPU.

The upper bits of a float32 are the index of a bucket. Buckets are so narrow that each holds at most one
rounding boundary (the middle between two neighbouring values). A bucket's entry is (code at its start) <<
(lower bits + 1), plus an offset: adding the float's lower bits carries into the code exactly where x is past
the boundary. Shifted back, the sum is the nearest code.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from .element import Element


class Lookup(NamedTuple):
    """An element format's tables, with the same `encode` and `decode`.

    Attributes:
      values: float32 [256], the value of each code, indexed by its bits as uint8.
      buckets: int32 [signs, n], the buckets' entries: a row for positive x, and in signed formats one for
        negative x.
    """

    values: Array
    buckets: Array

    @property
    def largest(self) -> float:
        """As `Element.largest`."""
        return 1.0

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """The same values as `Element.decode`."""
        return _at(self.values, codes.astype(jnp.uint8))

    def encode(self, x: Float[Array, "..."]) -> Int[Array, "..."]:
        """The same codes as `Element.encode`."""
        signed = len(self.buckets) == 2
        bucket, rest = _split(jax.lax.bitcast_convert_type(x, jnp.int32), signed)
        return (_at(self.buckets.reshape(-1), bucket.astype(jnp.uint32)) + rest) >> (_lower_bits(signed) + 1)


@functools.cache
def lookup(element: Element) -> Lookup:
    """Build the tables of an 8-bit element format, as NumPy arrays.

    Raises:
      ValueError: two rounding boundaries share a bucket.
    """
    codes = np.arange(element.lowest, element.highest + 1, dtype=np.int32)
    with jax.ensure_compile_time_eval():
        values = np.asarray(element.decode(jnp.asarray(codes)))
    wide = values.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    above = middles.astype(np.float32)  # the least float32 that rounds to the next code
    above = np.where(above <= middles, np.nextafter(above, np.float32(np.inf)), above)

    lower = _lower_bits(element.signed)
    start = np.arange(_tiny(lower), _tiny(lower) + _count(lower), dtype=np.int32) << lower
    start = start.view(np.float32)
    if element.signed:  # a negative bucket starts at its end farthest from zero, where codes are smallest
        start = np.concatenate([start, -np.nextafter(np.roll(start, -1), np.float32(0))])
        start[-1] = -2  # below every x
    first = np.searchsorted(middles, start.astype(np.float64)) + element.lowest
    bucket, rest = _split(above.view(np.int32), element.signed, np)
    inside = rest > 0  # rest 0: the boundary is the bucket's start, and the bucket has one code
    bucket, rest = bucket[inside], rest[inside]
    if len(set(bucket)) < len(bucket) or (np.abs(above) < 2 * start[0]).any():
        raise ValueError(
            f"element: got {element.name}, whose values lie too close; expected one boundary a bucket"
        )
    missing = np.full(len(start), 1 << lower)  # above any rest: no boundary inside
    missing[bucket] = rest
    buckets = ((first + 1) << (lower + 1)) - missing
    by_bits = np.zeros(256, np.float32)
    by_bits[codes.astype(np.uint8)] = values
    return Lookup(by_bits, buckets.astype(np.int32).reshape(1 + element.signed, -1))


def _lower_bits(signed: bool) -> int:
    """Bits below a bucket's index in a float32: one more if signed, for each sign then has half the codes."""
    return 16 + signed


def _tiny(lower: int) -> int:
    """The index of the first bucket, which all smaller magnitudes share."""
    return int(np.float32(2.0**-26).view(np.int32)) >> lower


def _count(lower: int) -> int:
    """The number of buckets from the smallest magnitude to 1."""
    return (int(np.float32(1.0).view(np.int32)) >> lower) - _tiny(lower) + 1


def _split(bits, signed: bool, np=jnp):
    """Split float bits into a bucket's index and the bits below it, which grow with x inside a bucket."""
    lower = _lower_bits(signed)
    bucket = np.maximum((bits & 0x7FFFFFFF) >> lower, _tiny(lower)) - _tiny(lower)
    if signed:
        ones = bits >> 31  # all ones for negative x, else zero
        bucket, bits = bucket + (ones & _count(lower)), bits ^ ones
    return bucket, bits & ((1 << lower) - 1)


def _at(table: Array, index: Array) -> Array:
    """Gather from a table. Indices are unsigned, so that none is counted from the end."""
    return table.at[index].get(mode="promise_in_bounds")
