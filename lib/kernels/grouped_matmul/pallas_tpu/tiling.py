"""Block sizes of the TPU kernels, and how they follow from a call.

How many rows a group has is known at run time alone: sizes are for groups of equal ones. The matrix unit is
given a matrix once for each visit, which takes it as long as some 128 rows: so a visit should see a whole
group if that is small. Tiles of a few heights are multiplied, each by code of its own.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from ...common.chips import LANES, VMEM_LIMIT
from ...common.tiling import Limit, round_up, search
from .visits import STRIPE

ROWS = 512  # of a large tile: more are no faster
NUMBERS = (
    2**21
)  # of such a tile: of longer rows there are fewer, and more columns that are multiplied at once
CODE = 3 * 2**29  # multiplications of a visit: the code for more takes long to compile
HALVED = 2048  # columns from which on there are two blocks at least: v5p has two cores that share a launch
STEP = 2**17  # bytes of HBM that could be read in the time that a visit costs on top


@dataclass(frozen=True)
class Tiling:
    """A visit multiplies rows, as many as one of `heights`, by some columns of a group's matrix."""

    heights: tuple[int, ...]  # in order
    columns: int

    @property
    def rows(self) -> int:
        """The rows of a tile."""
        return self.heights[-1]

    def usual(self, M: int, groups: int) -> int:
        """The place in `heights` of what a group's share of M rows takes, or a whole tile of it."""
        return bisect_left(self.heights[:-1], -(-M // groups))


@dataclass(frozen=True)
class OuterTiling:
    """A visit multiplies rows, as many as one of `heights`, for a block [depth, columns] of the result."""

    heights: tuple[int, ...]  # in order
    depth: int
    columns: int

    @property
    def rows(self) -> int:
        """The rows of a tile."""
        return self.heights[-1]


def heights_for(M: int, groups: int, most: int = ROWS) -> tuple[int, ...]:
    """Half of a group's share of M rows, all of it, a quarter and a half more; large tiles in quarters."""
    share, M = round_up(-(-M // groups), STRIPE), round_up(M, STRIPE)
    rows = min(3 * share // 2, most)
    some = (rows // 4, rows // 2, 3 * rows // 4) if rows == most else (share // 2, share, 5 * share // 4)
    heights = {round_up(n, STRIPE) for n in (*some, rows)}
    return (*sorted(n for n in heights if n < M), *([M] if max(heights) >= M else []))


def for_product(
    M: int,
    K: int,
    N: int,
    groups: int,
    *,
    itemsize: int,
    stored: int | None = None,
    fixed: int = 0,
    wide: Iterable[int] | None = None,
) -> Tiling | None:
    """Blocks for rows [M, K] by matrices [K, N]; None if none fits into VMEM.

    Args:
      M, K, N: sizes of the whole product, K the one that is summed over.
      groups: the matrices.
      itemsize: bytes of a number.
      stored: bytes of a packed matrix for each column of the product; None: it is floats.
      fixed: bytes of VMEM besides.
      wide: the numbers of columns to try; None: any of whole registers.
    """
    heights = heights_for(M, groups, max(LANES, min(ROWS, NUMBERS // K // LANES * LANES)))
    rows, visits = heights[-1], -(-M // heights[-1]) + groups

    def vmem(columns: int) -> int:
        # Twice what comes and goes: the next block is fetched while this one is worked on.
        matrix = K * columns * itemsize * 2 if stored is None else columns * (2 * stored + K * itemsize)
        return fixed + 2 * itemsize * rows * (K + columns) + matrix + 2 * 4 * rows * columns

    def cost(columns: int) -> int:
        across = -(-N // columns)
        trimmed = 2 * M * N if N % columns else 0
        absent = K * (across * columns - N) * groups  # columns that aren't there
        return across * (M * K * itemsize + visits * STEP) + itemsize * (trimmed + absent)

    most = round_up(N, LANES) if N < HALVED else N // 2
    widths = list(range(LANES, most + 1, LANES) if wide is None else wide)
    widths = [n for n in widths if rows * K * n <= CODE] or widths[:1]
    limit = Limit("bytes of VMEM", 7 * VMEM_LIMIT // 8, vmem)
    found = search({"columns": widths}, [limit], cost)
    return None if found.sizes is None else Tiling(heights, **found.sizes)


def for_outer(M: int, K: int, N: int, groups: int, *, itemsize: int) -> OuterTiling | None:
    """Blocks for the sum over rows of x [M, K] times y [M, N], a matrix [K, N] for each group."""
    heights = heights_for(M, groups)
    rows, visits = heights[-1], -(-M // heights[-1]) + groups

    def vmem(depth: int, columns: int) -> int:
        sums = depth * columns * (2 * itemsize + 3 * 4)
        return 2 * itemsize * rows * (depth + columns) + sums

    def cost(depth: int, columns: int) -> int:
        down, across = -(-K // depth), -(-N // columns)
        padded = down * depth * across * columns - K * N
        return itemsize * M * (K * across + N * down) + visits * STEP * down * across + 2 * groups * padded

    sizes = [n * LANES for n in (1, 2, 3, 4, 6, 8)]
    space = {
        "depth": [n for n in sizes if n <= round_up(K, LANES)],
        "columns": [n for n in sizes if n <= round_up(N, LANES)],
    }
    limits = [
        Limit("bytes of VMEM", 7 * VMEM_LIMIT // 8, vmem),
        Limit("multiplications", CODE // 2, lambda depth, columns: rows * depth * columns),
    ]
    found = search(space, limits, cost)
    return None if found.sizes is None else OuterTiling(heights, **found.sizes)
