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

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
LEVELS = 6  # 2**6 == CHUNK
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
        if self.interpret:
            return total + self._interpreted(pairs)

        def body(accumulator):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)

        return lax.optimization_barrier(pl.run_state(body)(plgpu.ACC.init(total)))

    def _interpreted(self, pairs) -> Array:
        def wide(x):
            return (x if isinstance(x, Array) else x[...]).astype(F32)

        return sum(jnp.dot(wide(a), wide(b), precision="highest") for a, b in pairs)

    def row_and_column(self) -> tuple[Array, Array]:
        """i and j at every [i, j] of a [CHUNK, CHUNK] tile."""
        shape = (CHUNK, CHUNK)
        return tuple(self.cast(lax.broadcasted_iota(jnp.int32, shape, axis)) for axis in (0, 1))

    def split(self, log_decay: Array, parts: list) -> None:
        """Write the bfloat16 tiles (one or two) that the log-decays are the sum of."""
        left = jnp.maximum(log_decay, SMALLEST_LOG)
        for part in parts:
            rounded = left.astype(part.dtype)
            part[...] = rounded
            left = left - rounded.astype(F32)

    def range_sums(self, chosen: Array, parts: list) -> Array:
        """For every i, the sum of the log-decays of the tokens s where `chosen` [i, s]."""
        matrix = chosen.astype(parts[0].dtype)
        return self.multiply((CHUNK, 64), *((matrix, part) for part in parts))


# Which token pairs [row, column] a 0/1 matrix holds; swap the first two arguments for its transpose.


def up_to(i: Array, s: Array, exclusive: bool) -> Array:
    """The decay of token s lies between the chunk's start and what query i reads."""
    return s < i if exclusive else s <= i


def after(j: Array, s: Array) -> Array:
    """The decay of token s lies between key j and the chunk's end."""
    return s > j


def is_query(i: Array, level: int | Array) -> Array:
    """At `level`, token i reads; otherwise it is read."""
    return ((i >> level) & 1) == 1


def towards_border(i: Array, s: Array, level: int | Array, exclusive: bool) -> Array:
    """The decay of token s lies between token i and the border of its block at `level`."""
    query = is_query(i, level)
    reach = (query & up_to(i, s, exclusive)) | (~query & after(i, s))
    return ((i >> level) == (s >> level)) & reach


def pairs_of(i: Array, j: Array, level: int | Array) -> Array:
    """i and j lie in opposite halves of one block at `level`; in both orders."""
    return ((i >> level) ^ (j >> level)) == 1
