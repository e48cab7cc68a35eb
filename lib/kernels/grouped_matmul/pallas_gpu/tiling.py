"""Sizes of the products' tiles on Hopper."""

from typing import NamedTuple

from ...common.chips import GPUS, SHARED_MEMORY

PROCESSORS = GPUS["H100 SXM"].processors
DEPTH = 64  # of a step of the sum: a row of 128 bytes, the widest that the copy engine swizzles
ROWS = 64  # of a warpgroup's part of a tile: wgmma has as many
STORED = 64  # columns that leave together
BAND = 8  # columns of tiles that are worked on at once
STAGES = 6
BARRIERS = 1024  # bytes


class Tiling(NamedTuple):
    """The cut of a product into tiles.

    Attributes:
      warpgroups: of a program, ROWS rows of the result each.
      columns: of the result.
      stages: steps of the sum that shared memory holds.
    """

    warpgroups: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        """Rows of the result in a tile."""
        return self.warpgroups * ROWS

    @property
    def programs(self) -> int:
        """Programs at once: one a processor."""
        return PROCESSORS


def of_rows(M: int, E: int, N: int) -> Tiling:
    """Sizes for M sorted rows times matrices [E, K, N]."""
    # Groups of few rows: a second warpgroup would have none, while steps on their way hide HBM's latency.
    warpgroups = 1 if M <= ROWS * E else 2
    return _filled(warpgroups, max(-(-M // (ROWS * warpgroups)), min(E, M)), N)


def of_experts(E: int, K: int, N: int) -> Tiling:
    """Sizes for the sums x_i^T y_i, [E, K, N]."""
    warpgroups = 2 if K % (2 * ROWS) == 0 else 1
    return _filled(warpgroups, E * K // (ROWS * warpgroups), N)


def _filled(warpgroups: int, tiles: int, N: int) -> Tiling:
    """Widest tiles that give each processor one, of those that divide N."""
    widths = [n for n in (256, 128, 64) if N % n == 0]
    columns = next((n for n in widths if tiles * (N // n) >= PROCESSORS), widths[-1])
    step = (warpgroups * ROWS + columns) * DEPTH * 2
    room = SHARED_MEMORY - BARRIERS - warpgroups * 2 * ROWS * STORED * 2
    return Tiling(warpgroups, columns, min(STAGES, room // step))
