"""Codes of 8 bits by tables instead of arithmetic: faster where a cache holds the tables, as a CPU's does.

The upper bits of a float name a bucket so narrow that at most one middle between two values lies in it. The
bucket's entry is the code at its start, shifted left, and what the lower bits must be topped up with to reach
the next code: entry and lower bits added and shifted back are the nearest code.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from .format import Format


class Lookup(NamedTuple):
    """The tables of a format: a format's `encode` and `decode` by other means.

    Attributes:
      values: float32 [256], of the codes by their bits.
      buckets: int32 [signs, n], entries of the buckets of positive numbers, and of a signed format's negative
        ones.
    """

    values: Array
    buckets: Array

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """`Format.decode`."""
        return _at(self.values, codes.astype(jnp.uint8))

    def encode(self, x: Float[Array, "..."]) -> Int[Array, "..."]:
        """`Format.encode`."""
        signed = len(self.buckets) == 2
        bucket, rest = _split(jax.lax.bitcast_convert_type(x, jnp.int32), signed)
        return (_at(self.buckets.reshape(-1), bucket.astype(jnp.uint32)) + rest) >> (_lower_bits(signed) + 1)


@functools.cache
def lookup(format: Format) -> Lookup:
    """The tables of a format of 8 bits, in numpy.

    Raises:
      ValueError: its values lie too close for them.
    """
    codes = np.arange(format.lowest, format.highest + 1, dtype=np.int32)
    with jax.ensure_compile_time_eval():
        values = np.asarray(format.decode(jnp.asarray(codes)))
    wide = values.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    above = middles.astype(np.float32)  # the least number of the next code
    above = np.where(above <= middles, np.nextafter(above, np.float32(np.inf)), above)

    lower = _lower_bits(format.signed)
    start = np.arange(_tiny(lower), _tiny(lower) + _count(lower), dtype=np.int32) << lower
    start = start.view(np.float32)
    if format.signed:  # what is farthest from zero has the smallest code
        start = np.concatenate([start, -np.nextafter(np.roll(start, -1), np.float32(0))])
        start[-1] = -2  # no number is as small
    first = np.searchsorted(middles, start.astype(np.float64)) + format.lowest
    bucket, rest = _split(above.view(np.int32), format.signed, np)
    inside = rest > 0  # else the bucket starts with that code
    bucket, rest = bucket[inside], rest[inside]
    if len(set(bucket)) < len(bucket) or (np.abs(above) < 2 * start[0]).any():
        raise ValueError(f"format: got {format.name}, whose values lie too close; its arithmetic fits")
    missing = np.full(len(start), 1 << lower)  # more than any rest: no other code here
    missing[bucket] = rest
    buckets = ((first + 1) << (lower + 1)) - missing
    by_bits = np.zeros(256, np.float32)
    by_bits[codes.astype(np.uint8)] = values
    return Lookup(by_bits, buckets.astype(np.int32).reshape(1 + format.signed, -1))


def _lower_bits(signed: bool) -> int:
    """Bits below a bucket's name: one more where half of the codes are negative, and so lie wider apart."""
    return 16 + signed


def _tiny(lower: int) -> int:
    """The bucket that all smaller magnitudes are in."""
    return int(np.float32(2.0**-26).view(np.int32)) >> lower


def _count(lower: int) -> int:
    """Buckets from the smallest magnitude to 1."""
    return (int(np.float32(1.0).view(np.int32)) >> lower) - _tiny(lower) + 1


def _split(bits, signed: bool, np=jnp):
    """The bucket of each number, given its bits, and the rest of them: larger for larger numbers."""
    lower = _lower_bits(signed)
    bucket = np.maximum((bits & 0x7FFFFFFF) >> lower, _tiny(lower)) - _tiny(lower)
    if signed:
        ones = bits >> 31  # of a negative number; else zeros
        bucket, bits = bucket + (ones & _count(lower)), bits ^ ones
    return bucket, bits & ((1 << lower) - 1)


def _at(table: Array, index: Array) -> Array:
    """Entries of a table; of unsigned indices none is counted from the end."""
    return table.at[index].get(mode="promise_in_bounds")
