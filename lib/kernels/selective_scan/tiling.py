"""Block sizes of the kernels, and how they follow from a call."""

import dataclasses

from ..common.chips import LANES, SUBLANES
from ..common.tiling import largest, round_up


@dataclasses.dataclass(frozen=True)
class TPUTiling:
    """One grid step takes `time` tokens of `channels` channels with `states` states each (N and zeros).

    `rows` tokens are read, walked over and written at once: 16 are the height of a bfloat16 tile.
    """

    time: int
    rows: int
    channels: int
    states: int

    @property
    def tiles(self) -> int:
        """The number of tiles of 128 channels that lie beside each other."""
        return self.channels // LANES


TPU_MOST_STATES = 128  # at 128 channels they fill a quarter of the registers


def for_tpu(T: int, D: int, N: int, *, time: int) -> TPUTiling:
    """At most `time` tokens, a power of two from 128; channels such that their states lie in 16 registers."""
    states, lanes = round_up(N, SUBLANES), round_up(D, LANES)
    most = max(LANES, SUBLANES * 16 * LANES // states)
    channels = largest((1024, 512, 256), lambda n: n <= most and lanes % n == 0, otherwise=LANES)
    rows = 16 if T <= 16 else 32
    whole = round_up(T, LANES)
    times = (n for n in (512, 256, LANES) if n <= time)
    longest = round_up(T, rows) if T <= LANES else largest(times, lambda n: whole % n == 0)
    return TPUTiling(longest, rows, channels, states)


# Tokens a tile. Of the gradient's the states stay in shared memory: 8 KB a token with 16 states.
GPU_FORWARD, GPU_BACKWARD = 16, 8
GPU_MOST_STATES = 16
