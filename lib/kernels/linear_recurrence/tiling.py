"""Block sizes of the kernels, and how they follow from a call."""

import dataclasses

LANES = 128
ROWS = 16  # tokens read and written at once: the height of a bfloat16 tile, two float32 ones


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclasses.dataclass(frozen=True)
class TPUTiling:
    """One grid step takes `time` tokens of `channels` channels. Enough channels to hide a token's latency."""

    time: int
    channels: int


def for_tpu(T: int, D: int, *, time: int, channels: int = 512) -> TPUTiling:
    """Blocks of at most `time` x `channels`, smaller for smaller calls, and few channels left over."""
    lanes = round_up(D, LANES)
    channels = next(
        c for c in (channels, 384, 256, LANES) if c <= channels and (lanes % c == 0 or c == LANES)
    )
    return TPUTiling(time=min(time, round_up(T, ROWS)), channels=channels)
