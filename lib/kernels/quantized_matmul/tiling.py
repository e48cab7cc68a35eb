"""Block sizes of the kernels, and how they follow from a call."""

from dataclasses import dataclass

from ..common.chips import LANES, VMEM_LIMIT
from ..common.tiling import Limit, round_up, search

STEP = 2**17  # bytes of HBM that could be read in the time that a grid step costs on top


@dataclass(frozen=True)
class TPUTiling:
    """One grid step multiplies `tokens` rows of x by `columns` of W, `depth` rows of it."""

    tokens: int
    columns: int
    depth: int


def for_tpu(
    M: int, K: int, N: int, *, block: int, bits: int, groups: int, parts: int, whole: bool = False
) -> TPUTiling | None:
    """Blocks that move few bytes, in steps that are neither many nor large; None if none fits into VMEM.

    Args:
      M, K, N: tokens, rows and columns of W; M a multiple of 8, K of `block`.
      block: codes that are packed together.
      bits: bits of a code.
      groups: groups along K.
      parts: bfloat16 arrays that x is split in.
      whole: a grid step takes all of K, and sums up over the columns: the gradient.
    """
    blocks = K // block
    depths = [n * block for n in range(1, blocks + 1) if blocks % n == 0] if not whole else [K]
    space = {
        "tokens": sorted({min(n, round_up(M, 8)) for n in (8, 16, 32, 64, 128, 256)}),
        "columns": [n for n in (512, 256, 128) if n == LANES or n <= round_up(N, LANES)],
        "depth": depths,
    }

    def vmem(tokens: int, columns: int, depth: int) -> int:
        # Twice what comes and goes: the next block is fetched while this one is worked on.
        x = 2 * 2 * parts * tokens * (columns if whole else depth)
        codes, stored = 2 * depth * columns * bits // 8, 2 * 5 * groups * columns
        sums = tokens * (depth if whole else columns)
        work = 4 * columns * (4 * groups + 4 * block + 2 * parts * tokens)  # decoded scales, tiles, products
        return x + codes + stored + 4 * 3 * sums + work

    def cost(tokens: int, columns: int, depth: int) -> tuple[int, int]:
        down, across, deep = -(-M // tokens), -(-N // columns), K // depth
        codes = K * columns * bits // 8 * across
        x = 2 * parts * M * (N if whole else K * (across if deep > 1 else 1))
        return down * codes + x + depth * columns * bits // 8 + STEP * down * across * deep, -columns

    found = search(space, [Limit("bytes of VMEM", VMEM_LIMIT, vmem)], cost)
    return None if found.sizes is None else TPUTiling(**found.sizes)
