"""Block sizes of the kernels, and how they follow from a call."""

import dataclasses

from ..common.chips import LANES
from ..common.tiling import largest, round_up

ROWS = 16  # tokens read and written at once: the height of a bfloat16 tile, two float32 ones


@dataclasses.dataclass(frozen=True)
class TPUTiling:
    """One grid step takes `time` tokens of `channels` channels. Enough channels to hide a token's latency."""

    time: int
    channels: int


def for_tpu(T: int, D: int, *, time: int, channels: int = 512) -> TPUTiling:
    """Blocks of at most `time` x `channels`, smaller for smaller calls, and few channels left over."""
    lanes = round_up(D, LANES)
    sizes = [n for n in (512, 384, 256) if n <= channels]
    channels = largest(sizes, lambda n: lanes % n == 0, otherwise=LANES)
    return TPUTiling(time=min(time, round_up(T, ROWS)), channels=channels)
