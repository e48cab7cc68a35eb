"""The kernels' bodies: x W and dy W^T, a packing block of W's rows at a time."""

import enum
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from ....formats import CodedScales, Format, Mixture
from ....formats.scales import Scaling
from ...common.tpu import F32, iota
from .tiles import BF16, TILE, Table, Tiles, element_of, line, split, tables_of

AT_ONCE = 4  # blocks of a turn of the loop: v5e takes 10.5 thousand cycles where one by one takes 12.4


class Kind(enum.Enum):
    """The values that the matrix unit multiplies x by; and when the scale follows."""

    VALUES = "decoded values, scaled after the product of each group"
    SCALED = "decoded values times their scale"
    WHOLE = "int8 codes, and x in int8 too; scaled after"
    COUNTED = "codes counted from the lowest one, plus 2^bits; scaled after, even rows first"
    FOURFOLD = "four times values of fp4_e2m1; scaled after, even rows first"
    LOOKED_UP = "values of a table of 16 at most; scaled after, even rows first"


def terms(parts: int) -> list[tuple[int, int]]:
    """The products of parts of two factors that matter."""
    return [(i, j) for i in range(parts) for j in range(parts - i)]


@dataclass(frozen=True)
class Product:
    """The static description of one launch."""

    tiles: Tiles
    kind: Kind
    parts: int  # bfloat16 arrays that x, or dy, is split in
    order: int  # parts of the sums over groups, and of what they are multiplied by
    blocks: int  # packing blocks of a grid step
    steps: int  # grid steps that add up one result
    columns: int  # of W
    wide: int  # columns of a grid step

    @property
    def format(self) -> Format:
        return self.tiles.format

    @functools.cached_property
    def gain(self) -> float:
        """A value is gain * u + base, for u what is multiplied."""
        return self._line[0]

    @functools.cached_property
    def base(self) -> float:
        return self._line[1]

    @property
    def _line(self) -> tuple[float, float]:
        bits, linear = self.format.bits, line(self.format.element)
        if self.kind is Kind.COUNTED:
            return linear.gain, linear.start - linear.gain * 2**bits
        if self.kind is Kind.WHOLE:  # u is n less 2^(bits - 1) where codes are signed or have 8 bits
            lowest = 2 ** (bits - 1) if self.tiles.signed or bits == 8 else 0
            return linear.gain, linear.start + linear.gain * lowest
        return (0.25 if self.kind is Kind.FOURFOLD else 1.0), 0.0

    @property
    def joined(self) -> bool:
        """All tiles of a block are multiplied at once."""
        return self.kind is Kind.SCALED or self.tiles.group % self.tiles.block == 0

    @property
    def apart(self) -> int:
        """The groups of a tile that are scaled after the product: each has a copy of x, zero elsewhere."""
        return 1 if self.kind is Kind.SCALED else max(TILE // self.tiles.group, 1)

    # Inside a kernel:

    def scales(self, scales_ref, outer_ref, offset_ref) -> Array:
        """The float32 scales of all groups [G, columns]."""
        stored: Any = scales_ref[...]
        if outer_ref is not None:
            offset = None if offset_ref is None else offset_ref[0, 0]
            stored = CodedScales(stored, outer_ref[0, 0], offset, self.format.scheme.element)
        return self.format.scheme.scale(Scaling(stored))

    def specials(self, choices_ref) -> Array:
        """The float32 values [G, columns] that groups' choices give the special code of a mixture.

        Those for a table are bfloat16 numbers.
        """
        assert isinstance(self.format, Mixture)
        dtype = BF16 if self.kind is Kind.LOOKED_UP else F32
        first, *others = (float(np.asarray(element.special, dtype)) for element in self.format.elements)
        choice = choices_ref[...].astype(jnp.int32)
        found = jnp.full(choice.shape, first, F32)
        for i, special in enumerate(others, 1):
            found = jnp.where(choice == i, special, found)
        return found

    def tables(self) -> list[Table]:
        """The tables that tiles are looked up in, if they are."""
        return tables_of(element_of(self.format), self.wide) if self.kind is Kind.LOOKED_UP else []

    def tiles_of(
        self,
        codes_ref,
        i: Any,
        first: Any,
        scale_ref,
        zero_ref,
        choice_ref=None,
        tables: Sequence[Table] = (),
    ) -> list[list[Array]]:
        """The tiles of block i of this grid step, whose first block is `first`; one if they are joined.

        Each in as many parts as it takes.
        """
        tiles, n = self.tiles, self.tiles.per_block
        plain = self.kind in (Kind.VALUES, Kind.SCALED)
        x = tiles.bytes(codes_ref, i) if plain else tiles.words(codes_ref, i)

        def of_groups(ref, tile: int) -> Array | None:
            return None if ref is None else tiles.spread(ref, (first + i) * n + tile)

        def decoded(tile: int, scaled: bool) -> list[Array]:
            scale, zero = ((of_groups(r, tile) if scaled else None) for r in (scale_ref, zero_ref))
            return tiles.decoded(x, tile, scale, zero, of_groups(choice_ref, tile))

        if self.kind is Kind.FOURFOLD:
            bits = tiles.fp4_e2m1(x)
        make: dict[Kind, Callable[[int], list[Array]]] = {
            Kind.VALUES: lambda tile: decoded(tile, False),
            Kind.COUNTED: lambda tile: [tiles.counted(x, tile)],
            Kind.FOURFOLD: lambda tile: [tiles.fourfold(*bits, tile)],
            Kind.LOOKED_UP: lambda tile: [tiles.looked_up(x, tile, tables, of_groups(choice_ref, tile))],
            Kind.WHOLE: lambda tile: [tiles.whole(x, tile)],
            Kind.SCALED: lambda tile: decoded(tile, True),
        }
        made = [make[self.kind](t) for t in range(n)]
        if self.joined and n > 1:
            made = [[jnp.concatenate(parts, 0) for parts in zip(*made, strict=True)]]
        return made

    def multiply(self, x: Array, tile: list[Array], axis: int = 0) -> list[Array]:
        """x times a tile, over its rows (axis 0) or columns, in float32: for each of its groups apart.

        x [parts * apart, tokens, .]: the copies for all groups, of the first part of x, then of the next.
        """
        tokens, n = x.shape[1], self.apart
        sums: list[Any] = [0.0] * n
        for j, part in enumerate(tile):
            used = n * min(self.parts, max(self.parts, len(tile)) - j)  # no products of small parts
            rows = x[0] if used == 1 else x[:used].reshape(used * tokens, x.shape[2])
            dtype = jnp.int32 if self.kind is Kind.WHOLE else F32
            y = lax.dot_general(rows, part, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)
            y = y.astype(F32)
            for p in range(used):
                sums[p % n] = sums[p % n] + y[p * tokens : (p + 1) * tokens]
        return sums

    def each_block(self, visit: Callable[[Any], None]) -> None:
        """Visit the blocks of a grid step, some in a row: one is unpacked while another is multiplied."""
        some = 1 if self.tiles.interpret else AT_ONCE

        def step(i: Any, carry: Any) -> Any:
            for j in range(some):
                visit(i * some + j)
            return carry

        lax.fori_loop(np.int32(0), np.int32(self.blocks // some), step, np.int32(0))
        for i in range(self.blocks // some * some, self.blocks):
            visit(i)

    def when(self, step: Any, at: int) -> Callable[[Callable[[], None]], None]:
        """Run what it decorates in one of the grid steps that add up a result."""
        return (lambda run: run()) if self.steps == 1 else pl.when(step == at)


def forward_kernel(
    p: Product, *, x_ref, codes_ref, scales_ref, y_ref, sum_ref, scale_ref, zeros_ref=None, zero_ref=None,
    outer_ref=None, offset_ref=None, choices_ref=None, choice_ref=None, sums_ref=None, tokens_ref=None,
    bias_ref=None,
):  # fmt: skip
    """Grid (tokens, columns, depth). `scale`, `zero` and `choice` hold what is decoded for groups."""
    k, size, tables = pl.program_id(2), p.tiles.block, p.tables()
    first = k * p.blocks

    @p.when(k, 0)
    def _():
        scale = p.scales(scales_ref, outer_ref, offset_ref)
        scale_ref[...] = scale * p.gain
        zero = None if zeros_ref is None else zeros_ref[...].astype(jnp.int32).astype(F32)
        if zero_ref is not None:
            zero_ref[...] = zero
        if choices_ref is not None:
            choice_ref[...] = p.specials(choices_ref)
        if sums_ref is None:
            sum_ref[...] = jnp.zeros_like(sum_ref)
            return
        # sum_k x_k (gain u_k + base - zero) = gain x u + (sum_k x_k) (base - zero)
        rest = split(scale * (p.base if zero is None else p.base - zero), p.order)
        rest = jnp.concatenate([rest[j].astype(BF16) for _, j in terms(p.order)], 0)
        sum_ref[...] = jnp.dot(sums_ref[...], rest, preferred_element_type=F32)

    def visit(i):
        total: Any = 0.0
        made = p.tiles_of(codes_ref, i, first, scale_ref, zero_ref, choice_ref, tables)
        depth = size // len(made)
        for t, tile in enumerate(made):
            here = pl.ds(pl.multiple_of(i * size + t * depth, depth), depth)
            sums = p.multiply(x_ref[:, :, here], tile)
            if p.kind is Kind.SCALED:
                total = sums[0]
                continue
            number = (first + i) * len(made) + t  # of this tile in all of W
            row = number * p.apart if p.apart > 1 else lax.div(number, np.int32(p.tiles.group // depth))
            for j, y in enumerate(sums):
                total = total + y * scale_ref[pl.ds(row + j, 1), :]
        sum_ref[...] += total

    p.each_block(visit)

    @p.when(k, p.steps - 1)
    def _():
        y = sum_ref[...]
        if tokens_ref is not None:
            y = y * tokens_ref[...]
        if bias_ref is not None:
            y = y + bias_ref[...]
        y_ref[...] = y.astype(y_ref.dtype)


def backward_kernel(
    p: Product, *, dy_ref, codes_ref, scales_ref, dx_ref, sum_ref, scale_ref, zeros_ref=None, zero_ref=None,
    outer_ref=None, offset_ref=None, choices_ref=None, choice_ref=None,
):  # fmt: skip
    """Grid (tokens, columns): all of dx [tokens, K] is summed up over the columns."""
    n, size = pl.program_id(1), p.tiles.block
    scale = p.scales(scales_ref, outer_ref, offset_ref)
    inside = n * p.wide + iota(scale.shape, 1) < p.columns  # what lies behind W's last column may be anything
    scale_ref[...] = jnp.where(inside, scale, 0.0)
    if zero_ref is not None:
        zero_ref[...] = zeros_ref[...].astype(jnp.int32).astype(F32)
    if choices_ref is not None:
        choice_ref[...] = p.specials(choices_ref)

    @p.when(n, 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(i):
        (tile,) = p.tiles_of(codes_ref, i, 0, scale_ref, zero_ref, choice_ref)
        sum_ref[:, pl.ds(pl.multiple_of(i * size, TILE), size)] += p.multiply(dy_ref[...], tile, axis=1)[0]

    p.each_block(visit)

    @p.when(n, p.steps - 1)
    def _():
        dx_ref[...] = sum_ref[...].astype(dx_ref.dtype)
