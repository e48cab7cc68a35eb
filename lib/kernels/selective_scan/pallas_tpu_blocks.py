"""What the TPU kernels share: which block a grid step works on, columns of B and C, sums over sublanes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tiling import LANES, ROWS, SUBLANES, TPUTiling

F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    tiling: TPUTiling
    blocks: int  # of time
    softplus: bool
    gated: bool
    packed: bool
    interpret: bool  # on CPU, where no stride is zero

    def each_tile(self, visit, carry, *, backwards: bool = False):
        """Thread `carry = visit(first row, carry)` through the tiles of ROWS tokens of a block."""
        tiles = self.tiling.time // ROWS

        def step(i, carry):
            return visit(pl.multiple_of((tiles - 1 - i if backwards else i) * ROWS, ROWS), carry)

        return lax.fori_loop(0, tiles, step, carry)

    def columns(self, ref, row) -> Array:
        """Tokens row, row + 1, ... of a [N, time] block in lanes 0, 1, ..."""
        lane = row & (LANES - 1)
        tile = ref[:, pl.ds(pl.multiple_of(row - lane, LANES), LANES)]
        return pltpu.roll(tile, (LANES - lane) & (LANES - 1), 1)

    def column(self, columns: Array, r: int) -> Array:
        """Token r of `columns` for every channel: [N, channels]."""
        tile = jnp.broadcast_to(columns[:, r : r + 1], (columns.shape[0], LANES))
        return jnp.concatenate([tile] * self.tiling.tiles, axis=1)

    def spread(self, ref, row) -> Array:
        """A row of a [tokens, channels] scratch for every state: [N, channels]."""
        if self.interpret:
            tile = jnp.broadcast_to(ref[pl.ds(row, 1), :], (SUBLANES, self.tiling.channels))
        else:  # one load fills all sublanes
            tile = ref[pl.ds(row, SUBLANES, stride=0), :]
        return jnp.concatenate([tile] * (self.tiling.states // SUBLANES), axis=0)

    def keep(self, keeps: Array | None, r: int, a: Array) -> Array:
        """The decay, but zero where a document starts."""
        if keeps is None:
            return a
        return a * jnp.concatenate([self.column(keeps, r)] * (self.tiling.states // SUBLANES), axis=0)

    def over_tiles(self, x: Array) -> Array:
        """Sum of the tiles of 128 channels: [N, 128]."""
        return sum(x[:, i * LANES : (i + 1) * LANES] for i in range(self.tiling.tiles))


def step_sizes(plan: Plan, raw: Array) -> Array:
    """dt, from what came in with its bias added."""
    if not plan.softplus:
        return raw
    return jnp.maximum(raw, 0) + jnp.log1p(jnp.exp(-jnp.abs(raw)))


class OverStates:
    """Sums over N of one [N, channels] array for each token of a tile, as rows of [ROWS, channels].

    Eight tokens are summed in a tree: at each level two partial sums share a register, half of each.
    """

    def __init__(self):
        self.tiles = [[] for _ in range(ROWS // SUBLANES)]

    def put(self, r: int, x: Array) -> None:
        """The array of token r. Tokens come in order, first to last or last to first."""
        part = sum(x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES))
        tile = self.tiles[r // SUBLANES]
        tile.append((r % SUBLANES, 1, part))
        while len(tile) > 1 and tile[-1][1] == tile[-2][1]:
            (r1, level, p1), (r2, _, p2) = tile.pop(), tile.pop()
            even, odd = (p1, p2) if r1 < r2 else (p2, p1)
            is_odd = lax.broadcasted_iota(jnp.int32, even.shape, 0) & level != 0
            mine, other = jnp.where(is_odd, odd, even), jnp.where(is_odd, even, odd)
            tile.append((min(r1, r2), 2 * level, mine + pltpu.roll(other, level, 0)))

    def rows(self) -> Array:
        return jnp.concatenate([tile[0][2] for tile in self.tiles], axis=0)


def silu(z: Array) -> Array:
    return z * jax.nn.sigmoid(z)
