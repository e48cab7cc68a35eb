"""What the Mosaic GPU kernels of linear attention share: tiles, products, sums of log-decays.

Decay per channel without a positive exponent. Token pairs i > j of a chunk fall into six levels: level l
holds the pairs whose numbers first differ in bit l, so that i lies in the right half and j in the left half
of one block of 2^(l+1) tokens. Through the border between the halves the decay of a pair is a product of two
factors, each at most 1: i's from the border to i, and j's from j to the border. At each level a token is
either a query (bit l set) or a key, so one tile X of scaled rows serves both, and X X^T holds the level's
pairs. The exponents are sums of log-decays over ranges: a 0/1 matrix times the tile of log-decays, on the
tensor cores, with the log-decays split into two bfloat16 parts. A sum over a range never subtracts, so strong
gates cost no digits.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
LEVELS = 6  # 2**6 == CHUNK
SQUARE = (CHUNK, CHUNK)
F32 = jnp.float32
TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row of a tile
COLS = plgpu.Layout.WGMMA.reduce(0)  # one value a column
SMALLEST_LOG = -1e4  # exp of it is 0; keeps log_decay = -inf out of 0 * inf


def smem(shape: tuple[int, ...], dtype):
    """A buffer that both the copy engine and wgmma read: rows of 128 bytes, swizzled."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    )


def along_rows(x: Array, shape: tuple[int, int]) -> Array:
    """x[i] at every [i, j]; x in layout ROWS."""
    return lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: Array, shape: tuple[int, int]) -> Array:
    """x[j] at every [i, j]; x in layout COLS."""
    return lax.broadcast_in_dim(x, shape, [1])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Registers and products inside one kernel.

    Interpreted, there are no register layouts, and a product is XLA's: the interpreters of jax 0.10 to 0.12
    miss parts of `wgmma` (operands in registers) and `pl.run_state`.
    """

    interpret: bool

    def cast(self, x: Array, layout=TILE) -> Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def load(self, ref, layout=TILE) -> Array:
        """The values of a shared-memory buffer as float32 registers."""
        return self.cast(ref[...], layout).astype(F32)

    def transposed(self, ref):
        return ref[...].T if self.interpret else plgpu.transpose_ref(ref, (1, 0))

    def full(self, shape: tuple[int, int], value: int, dtype=F32) -> Array:
        return self.cast(jnp.full(shape, value, dtype))

    def multiply(self, shape: tuple[int, int], *pairs) -> Array:
        """The float32 sum of a @ b over pairs (a, b); a in shared memory or registers, b in shared memory."""
        if self.interpret:
            return self._interpreted(pairs)

        def body(accumulator):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        # Reading an accumulator is a wait without a data dependency: the barrier keeps its uses behind it.
        return lax.optimization_barrier(pl.run_scoped(body, plgpu.ACC(shape, F32)))

    def add_products(self, total: Array, *pairs) -> Array:
        """`total` plus the products, in total's registers."""
        return self.add_each((total, *pairs))[0]

    def add_each(self, *sums) -> tuple[Array, ...]:
        """Several (total, pair, ...) at once: one wait for all."""
        if self.interpret:
            return tuple(total + self._interpreted(pairs) for total, *pairs in sums)

        def body(accumulators):
            for accumulator, (_, *pairs) in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(accumulator, a, b)

        totals = tuple(plgpu.ACC.init(total) for total, *_ in sums)
        return tuple(lax.optimization_barrier(pl.run_state(body)(totals)))

    def _interpreted(self, pairs) -> Array:
        def wide(x):
            return (x if isinstance(x, Array) else x[...]).astype(F32)

        return sum(jnp.dot(wide(a), wide(b), precision="highest") for a, b in pairs)

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
