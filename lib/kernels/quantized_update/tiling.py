"""The number of elements that each backend works on at once."""

import dataclasses

from ..common.tiling import largest_divisor, round_up

CHUNK = 3 * 2**17  # numbers that the portable form works on at once: fewer, and threads wait to be started

ROWS = 32  # of a tile of bytes on TPU


@dataclasses.dataclass(frozen=True)
class TPUTiling:
    """One grid step takes `rows` rows of `groups` groups."""

    rows: int
    groups: int


def for_tpu(rows: int, groups: int, group_size: int) -> TPUTiling:
    """Rows as they lie where they are short enough, else equal parts of them; about 2^17 numbers a step."""
    most = max(1, 14336 // group_size)  # 32 rows of a gradient, two moments and their results: 11 MB
    groups = largest_divisor(groups, most)
    fit = max(ROWS, 2**17 // (groups * group_size) // ROWS * ROWS)
    return TPUTiling(min(fit, round_up(rows, ROWS)), groups)


GPU_GROUP_SIZES = (128, 256, 512, 1024, 2048)  # a power of two a thread
GPU_GROUPS = 64  # groups a block works through
GPU_AT_ONCE = 2  # groups whose loads are under way together
