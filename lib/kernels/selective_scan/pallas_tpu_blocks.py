"""The parts that the TPU kernels share: what a grid step works on, columns of B and C, sums over sublanes."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..common.chips import LANES, SUBLANES
from ..common.tpu import TimeGrid
from .tiling import TPUTiling


@dataclasses.dataclass(frozen=True)
class Spec:
    """A kernel's static description."""

    tiling: TPUTiling
    grid: TimeGrid
    softplus: bool
    interpret: bool  # on CPU, where no stride is zero

    def each_tile(self, visit, carry, *, backwards: bool = False):
        """Thread `carry = visit(first row, carry)` through the tiles of `rows` tokens of a block."""
        return self.grid.each_tile(self.tiling.rows, visit, carry, backwards=backwards)

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

    def fresh(self, keeps: Array | None, r: int, h: Array) -> Array:
        """The state, or zeros, whatever it holds, where a document starts."""
        if keeps is None:
            return h
        keep = jnp.concatenate([self.column(keeps, r)] * (self.tiling.states // SUBLANES), axis=0)
        return jnp.where(keep > 0.5, h, 0.0)

    def over_tiles(self, x: Array) -> Array:
        """Sum of the tiles of 128 channels: [N, 128]."""
        return sum(x[:, i * LANES : (i + 1) * LANES] for i in range(self.tiling.tiles))


def step_sizes(spec: Spec, raw: Array) -> Array:
    """dt, from what came in with its bias added."""
    if not spec.softplus:
        return raw
    return jnp.maximum(raw, 0) + jnp.log1p(jnp.exp(-jnp.abs(raw)))


class OverStates:
    """Sums over N of one [N, channels] array for each token of a tile, as rows of [tokens, channels].

    What is left after adding groups of eight states goes to a scratch [channels / 128, tokens * 8, 128] and
    comes back by strided loads, each the same sublane of eight tokens: adding whole registers finishes it.
    """

    def __init__(self, ref):
        self.ref = ref

    def put(self, r: int, x: Array) -> None:
        """The array of token r."""
        part = sum(x[i : i + SUBLANES] for i in range(0, x.shape[0], SUBLANES))
        for i in range(self.ref.shape[0]):
            self.ref[i, r * SUBLANES : (r + 1) * SUBLANES, :] = part[:, i * LANES : (i + 1) * LANES]

    def rows(self) -> Array:
        return jnp.concatenate([_sum_eights(self.ref.at[i]) for i in range(self.ref.shape[0])], axis=1)


def _sum_eights(ref) -> Array:
    """Sums of 8 neighbouring rows: [8 n, 128] -> [n, 128]."""
    firsts = range(0, ref.shape[0], SUBLANES * SUBLANES)
    sums = [sum(ref[pl.ds(i + s, SUBLANES, stride=SUBLANES), :] for s in range(SUBLANES)) for i in firsts]
    return jnp.concatenate(sums, axis=0)


def sigmoid(z: Array) -> Array:
    """A third of the work of `jax.nn.sigmoid`, whose division some chips do in many steps."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def silu(z: Array) -> Array:
    return z * sigmoid(z)
