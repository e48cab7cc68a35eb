"""The parts that the Mosaic GPU kernels of linear attention share: tiles, products, sums of log-decays.

Decay per channel without a positive exponent. Token pairs i > j of a chunk fall into six levels: level l
holds the pairs whose numbers first differ in bit l, so that i lies in the right half and j in the left half
of one block of 2^(l+1) tokens. Through the border between the halves the decay of a pair is a product of two
factors, each at most 1: i's from the border to i, and j's from j to the border. At each level a token is
either a query (bit l set) or a key, so one tile X of scaled rows serves both, and X X^T holds the level's
pairs. The exponents are sums of log-decays over ranges: a 0/1 matrix times the tile of log-decays, on the
tensor cores, with the log-decays split into two bfloat16 parts. A sum over a range never subtracts, so strong
gates cost no digits.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..common.hopper import F32, ROWS, Tiles, along_rows

CHUNK = 64
LEVELS = 6  # 2**6 == CHUNK
SQUARE = (CHUNK, CHUNK)
SMALLEST_LOG = -127.0  # exp of it is 0; sums of 64 keep their digits, and -inf stays out of 0 * inf


class ChunkTiles(Tiles):
    """Tiles of a chunk's tokens, and of pairs of them."""

    def row_and_column(self) -> tuple[Array, Array]:
        """i and j at every [i, j] of a [CHUNK, CHUNK] tile."""
        return tuple(self.cast(lax.broadcasted_iota(jnp.int32, SQUARE, axis)) for axis in (0, 1))

    def split(self, log_decay: Array, parts: list) -> None:
        """Write the bfloat16 tiles (one or two) that the log-decays, to base 2, are the sum of."""
        left = jnp.maximum(log_decay, SMALLEST_LOG) * math.log2(math.e)
        for part in parts:
            rounded = left.astype(part.dtype)
            part[...] = rounded
            left = left - rounded.astype(F32)

    def decays(self, chosen: Array, parts: list) -> Array:
        """For every i, the product of the decays of the tokens s where `chosen` [i, s]."""
        matrix = chosen.astype(parts[0].dtype)
        return jnp.exp2(self.multiply(SQUARE, *((matrix, part) for part in parts)))

    def number(self, tokens) -> None:
        """Write 0, 1, ... to a buffer: what depends on indices read from it stays inside a loop."""
        tokens[...] = self.cast(lax.broadcasted_iota(jnp.int32, (CHUNK,), 0), ROWS)


# Which tokens s a row of a 0/1 matrix picks. The first two functions take tiles of indices; exchange these
# for the transposed matrix. The others take vectors of indices, and give for each a range of tokens.


def up_to(i: Array, s: Array, exclusive: bool) -> Array:
    """The decay of token s lies between the chunk's start and what query i reads."""
    return s < i if exclusive else s <= i


def after(j: Array, s: Array) -> Array:
    """The decay of token s lies between key j and the chunk's end."""
    return s > j


class Range(NamedTuple):
    first: Array
    length: Array

    def holds(self, s: Array, along=along_rows) -> Array:
        """At each place of a tile: is s in the range of the place's row (or column)?"""
        distance = s - along(self.first, SQUARE)  # below the first, it wraps around to a large number
        return distance.astype(jnp.uint32) < along(self.length, SQUARE).astype(jnp.uint32)


def is_query(i: Array, level: int | Array) -> Array:
    """At `level`, token i reads; otherwise it is read."""
    return ((i >> level) & 1) == 1


def towards_border(i: Array, level: int | Array, exclusive: bool) -> Range:
    """The tokens whose decays lie between token i and the border in its block at `level`."""
    query, start = is_query(i, level), (i >> level) << level
    first = jnp.where(query, start, i + 1)
    end = jnp.where(query, i + (0 if exclusive else 1), start + (1 << level))
    return Range(first, end - first)


def opposite(i: Array, level: int | Array) -> Range:
    """The tokens in the other half of token i's block at `level`."""
    length = (i ^ i) + (1 << level)  # a vector in i's layout: a scalar's can't be broadcast
    return Range(((i >> level) ^ 1) << level, length)


def only(chosen: Array, range_: Range) -> Range:
    """The range where `chosen`, nothing elsewhere."""
    return Range(range_.first, jnp.where(chosen, range_.length, 0))
