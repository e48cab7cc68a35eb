"""Tiles of W in fast memory, from packed codes to what the matrix unit multiplies: shifts and masks alone.

Codes of any format are taken out of bytes, one in each 32 bits, and decoded; rows keep their order. That is
long beside the product of a few tokens, for which some formats' codes become bfloat16 numbers without ever
filling 32 bits, and others' are looked up. Bytes are read as words of four rows. Byte r of every word of a
packing block then holds the codes 4 t + r for all t: a shift and a mask give a quarter of a tile's codes, in
order. Two quarters in the halves of words are a bfloat16 array, which holds the even codes or the odd ones.
So such a tile of 128 rows has 64 even rows of W before 64 odd ones, and `even_first` puts the channels of x
in that order.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ....formats import Format, Minifloat, Mixture
from ....formats.element import Dependent, Element
from ....formats.olive import OutlierVictim
from ....formats.packing import planes
from ...common.chips import SUBLANES
from ...common.tpu import F32, iota

TILE = 128  # rows of W: the depth of the matrix unit
WORDS = TILE // 4  # the codes of a tile that one byte of the words holds
BF16 = jnp.bfloat16


def even_first(x: Array) -> Array:
    """Put even channels of x [..., K] before odd ones, within each 128."""
    tiles = x.reshape(*x.shape[:-1], -1, TILE)
    return jnp.concatenate([tiles[..., ::2], tiles[..., 1::2]], -1).reshape(x.shape)


def truncated(x: Array) -> Array:
    """The bfloat16 number next to each float32 towards zero, as float32: no compiler drops the rounding."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(-65536)
    return lax.bitcast_convert_type(bits, F32)


def split(x: Array, parts: int) -> list[Array]:
    """Float32 arrays of bfloat16 numbers that add up to x: three to all of it, two to 16 bits.

    The last is not yet rounded.
    """
    found = []
    for _ in range(parts - 1):
        found.append(truncated(x))
        x = x - found[-1]
    return [*found, x]


@dataclass(frozen=True)
class Line:
    """Values that are gain * n + start, for n the code counted from its lowest one."""

    gain: float
    start: float


def element_of(format: Format) -> Element:
    """The element format of codes; of a mixture that of all codes but one, whichever is chosen."""
    return format.elements[0].base if isinstance(format, Mixture) else format.element


def elements_of(format: Format) -> tuple[Element, ...]:
    """The element formats that groups may have."""
    return format.elements if isinstance(format, Mixture) else (format.element,)


@functools.cache
def line(element: Element) -> Line | None:
    """The line that an element's values lie on; None if they don't."""
    if isinstance(element, Dependent):
        return None
    signed = element.lowest < 0
    codes = np.arange(2**element.bits, dtype=np.int32) - (signed << (element.bits - 1))
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):  # some codes of fp8 are NaN
        values = np.asarray(element.decode(jnp.asarray(codes)), np.float64)
    found = Line(float(values[1] - values[0]), float(values[0]))
    return found if np.array_equal(values, found.gain * np.arange(len(codes)) + found.start) else None


@functools.cache
def exact(element: Element) -> bool:
    """Say whether every value is a bfloat16 number, as those of outlier-victim pairs are."""
    if isinstance(element, Dependent):
        return True
    codes = np.arange(element.lowest, element.highest + 1, dtype=np.int32)
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):  # some codes of fp8 are NaN
        values = np.asarray(element.decode(jnp.asarray(codes)), np.float32)
        rounded = np.asarray(truncated(jnp.asarray(values)))
    return bool(np.all((rounded == values) | np.isnan(values)))


def is_fp4_e2m1(element: Element) -> bool:
    """Say whether these are the 4-bit floating-point numbers of MXFP4 and NVFP4."""
    bits = {"exponent": 2, "mantissa": 1, "bias": 1, "signed": True, "reserved": 0}
    return isinstance(element, Minifloat) and all(getattr(element, name) == n for name, n in bits.items())


@functools.cache
def bfloat16_bits(element: Element) -> tuple[int, ...]:
    """The bits of the bfloat16 number nearest to each code's value."""
    codes = np.arange(2**element.bits, dtype=np.int32)
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):  # some codes of fp8 are NaN
        values = np.asarray(element.decode(jnp.asarray(codes)).astype(BF16))
    return tuple(values.view(np.uint16).tolist())


class Table(NamedTuple):
    """A table of eight bfloat16 numbers for each column, by the lowest three bits of a code.

    A look-up is a choice among a register's rows by an index in each place: it takes as long as an addition.
    """

    lower: Array  # [8, columns]: a number's bits in the lower half of an int32
    upper: Array  # the same in the upper half

    def with_row(self, row: int, values: Array) -> "Table":
        """The table with other values [1, columns] in one row: float32 that are bfloat16 numbers."""
        bits = lax.bitcast_convert_type(values, jnp.int32)
        here = iota(self.lower.shape, 0) == row
        upper = jnp.where(here, bits, self.upper)
        return Table(jnp.where(here, lax.shift_right_logical(bits, np.int32(16)), self.lower), upper)

    def at(self, index: Array, upper: bool) -> Array:
        """The entries of an index [rows, columns]."""
        entries = self.upper if upper else self.lower
        found = [
            jnp.take_along_axis(entries, index[r : r + SUBLANES], axis=0, mode="promise_in_bounds")
            for r in range(0, index.shape[0], SUBLANES)
        ]
        return jnp.concatenate(found, 0)


def tables_of(element: Element, columns: int) -> list[Table]:
    """Tables of an element's values, each with eight codes."""
    bits = bfloat16_bits(element)
    row, found = iota((SUBLANES, columns), 0), []
    for first in range(0, len(bits), SUBLANES):
        entries = jnp.full(row.shape, bits[first], jnp.int32)
        for i, value in enumerate(bits[first + 1 : first + SUBLANES], 1):
            entries = jnp.where(row == i, value, entries)
        found.append(Table(entries, entries << 16))
    return found


@dataclass(frozen=True)
class Tiles:
    """The way of W's packed codes to tiles [128, columns]."""

    format: Format
    block: int  # codes that are packed together: 128 or 256
    group: int  # rows of W that share a scale: 4, 8, 16, 32, 64, or a multiple of 128
    parts: int  # bfloat16 arrays that a tile of values is split in
    interpret: bool

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def rows(self) -> int:
        """The rows of bytes of a block."""
        return self.block * self.bits // 8

    @property
    def per_block(self) -> int:
        """The number of a block's tiles."""
        return self.block // TILE

    @property
    def signed(self) -> bool:
        """Codes are two's complement."""
        return self.format.element.lowest < 0

    @property
    def special(self) -> int | None:
        """The code whose value each group chooses; None if there is none."""
        return 1 << (self.bits - 1) if isinstance(self.format, Mixture) else None

    # Inside a kernel:

    def bytes(self, codes_ref, block: Any) -> Array:
        """The bytes of one block."""
        return codes_ref[pl.ds(pl.multiple_of(block * self.rows, self.rows), self.rows), :]

    def words(self, codes_ref, block: Any) -> Array:
        """The bytes of one block, four rows in each int32 [rows / 4, columns]."""
        return pltpu.bitcast(self.bytes(codes_ref, block), jnp.int32)

    def fields(self, x: Array, tile: int, *, rows: int, start: int = 0, lanes: int = 1, up: int = 0) -> Array:
        """The codes of a tile from int32s, `rows` of which hold it in each plane.

        Args:
          x: bytes (rows: 128), or words (rows: 32).
          tile: its number in the block.
          start: the bit of an int32 that codes are read from.
          lanes: 1 takes those; 2 also those 16 bits further, in the upper half; 4 those of all bytes.
          up: how far their lowest bit comes to lie from the lowest of its lane.
        """
        every = {1: 1, 2: 0x00010001, 4: 0x01010101}[lanes]
        total: Any = 0
        first = 0
        for width, low in planes(self.bits):
            height = self.block * width * rows // (8 * TILE)  # of this plane
            mask = _int32((((1 << width) - 1) << (low + up)) * every)
            pieces = []
            for t in range(rows * tile, rows * (tile + 1), min(height, rows)):
                place, row = divmod(t, height)
                piece = x[first + row : first + row + min(height, rows)]
                right = start + width * place - low - up
                if right > 0:
                    piece = lax.shift_right_logical(piece, np.int32(right))
                elif right < 0:
                    piece = lax.shift_left(piece, np.int32(-right))
                pieces.append(piece & mask)
            part = jnp.concatenate(pieces, 0) if len(pieces) > 1 else pieces[0]
            total = part | total
            first += height
        return total

    def decoded(
        self,
        x: Array,
        tile: int,
        scale: Array | None = None,
        zero: Array | None = None,
        choice: Array | None = None,
    ) -> list[Array]:
        """A tile of values from bytes, (value - zero) * scale if those are given, in `parts` arrays.

        `choice` is the value of the `special` code in each place.
        """
        x = x.astype(jnp.int32)
        if self.bits == 8:
            codes = x[TILE * tile : TILE * (tile + 1)]
        else:
            codes = self.fields(x, tile, rows=TILE)
            codes = (codes << (32 - self.bits)) >> (32 - self.bits) if self.signed else codes
        element = element_of(self.format)
        value = _pairs(codes, element) if isinstance(element, OutlierVictim) else element.decode(codes)
        value = value if choice is None else jnp.where(codes == self.special, choice, value)
        value = value if zero is None else value - zero
        return [part.astype(BF16) for part in split(value if scale is None else value * scale, self.parts)]

    def counted(self, words: Array, tile: int) -> Array:
        """A tile of 2^bits + n, for n the code counted from its lowest one, of formats of 7 bits at most.

        n becomes the first digits after the point of a bfloat16 number between 2^bits and 2^(bits + 1): all
        codes of two bytes are there after a shift, a mask and an exclusive or.
        """
        up = 7 - self.bits
        lowest = (1 << (self.bits - 1 + up)) if self.signed else 0  # the sign bit counts from the other end
        pattern = _int32((((127 + self.bits) << 7) | lowest) * 0x00010001)
        halves = [
            self.fields(words, tile, rows=WORDS, start=start, lanes=2, up=up) ^ pattern for start in (0, 8)
        ]
        return jnp.concatenate([pltpu.bitcast(half, BF16) for half in halves], 0)

    def fp4_e2m1(self, words: Array) -> tuple[Array, Array]:
        """Turn the eight codes of every word into bits of bfloat16 numbers: three lower, two highest.

        Of a code with sign s, exponent e and mantissa m, four times the value has the exponent 128 + e' and
        the first digit m': with e' = e and m' = m, but for 0.5, which is 2^1 there: e' = m' = 0. Zero has
        none of the bits, not 128 either.
        """
        ones = _int32(0x11111111)
        normal, mantissa = ((words >> 1) | (words >> 2)) & ones, words & ones
        low = (words & _int32(0x66666666)) | (mantissa & normal)
        high = (words & _int32(0x88888888)) | ((mantissa | normal) << 2)
        return low, high

    def fourfold(self, low: Array, high: Array, tile: int) -> Array:
        """A tile of four times the values, of what `fp4_e2m1` gives."""
        take = functools.partial(self.fields, tile=tile, rows=WORDS, lanes=2)
        halves = [take(low, start=start, up=6) | take(high, start=start, up=12) for start in (0, 8)]
        return jnp.concatenate([pltpu.bitcast(half, BF16) for half in halves], 0)

    def looked_up(
        self, words: Array, tile: int, tables: Sequence[Table], choice: Array | None = None
    ) -> Array:
        """A tile of the values in one or two tables, of formats of 4 bits at most.

        `choice` [1, columns] is the value of the `special` code in all of the tile.
        """
        if choice is not None and self.special is not None:
            number, row = divmod(self.special, SUBLANES)
            tables = [t.with_row(row, choice) if i == number else t for i, t in enumerate(tables)]

        def values(start: int, upper: bool) -> Array:
            codes = self.fields(words, tile, rows=WORDS, start=start)
            if len(tables) == 1:
                return tables[0].at(codes, upper)
            low, high = (table.at(codes & (SUBLANES - 1), upper) for table in tables)
            return jnp.where(codes >= SUBLANES, high, low)

        halves = [values(start, False) | values(start + 16, True) for start in (0, 8)]
        return jnp.concatenate([pltpu.bitcast(half, BF16) for half in halves], 0)

    def whole(self, words: Array, tile: int) -> Array:
        """A tile of int8 codes with rows in order; unsigned ones of 8 bits less 128."""
        codes = self.fields(words, tile, rows=WORDS, lanes=4)
        if self.bits < 8 and self.signed:  # the sign bit is spread over each byte: ((n ^ s) + 128 - s) ^ 128
            sign = 1 << (self.bits - 1)
            codes = (codes ^ _int32((sign | 0x80) * 0x01010101)) - _int32(sign * 0x01010101)
        if self.signed == (self.bits < 8):
            codes = codes ^ _int32(0x80808080)
        return pltpu.bitcast(codes, jnp.int8)

    def spread(self, rows_ref, tile: Any) -> Array:
        """The groups' rows of tile `tile` of all of W, each for its rows of W [128, columns]; or one."""
        columns = rows_ref.shape[1]
        if self.group >= TILE:
            row = lax.div(jnp.asarray(tile, jnp.int32), np.int32(self.group // TILE))
            return rows_ref[pl.ds(row, 1), :]
        n = TILE // self.group
        rows = [rows_ref[pl.ds(tile * n + j, 1), :] for j in range(n)]
        if self.group >= SUBLANES:
            return jnp.concatenate([jnp.broadcast_to(row, (self.group, columns)) for row in rows], 0)
        upper = iota((SUBLANES, columns), 0) < self.group  # two groups of four rows share a register
        return jnp.concatenate(
            [jnp.where(upper, a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)], 0
        )


def _pairs(codes: Array, element: OutlierVictim) -> Array:
    """The values of outlier-victim pairs [128, columns]: a code is an outlier's if its neighbour says so."""
    victim = (codes == element.lowest).astype(jnp.int32)
    first = (iota(codes.shape, 0) & 1) == 0
    beside = jnp.where(first, pltpu.roll(victim, TILE - 1, 0), pltpu.roll(victim, 1, 0))
    value = jnp.where(beside == 1, element.decode_outlier(codes), element.integer.decode(codes))
    return jnp.where(victim == 1, 0.0, value)


def _int32(bits: int) -> np.int32:
    """The int32 with these 32 bits."""
    return np.int32(bits - (1 << 32) if bits >> 31 else bits)
