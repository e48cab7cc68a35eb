"""Block sizes of the Mosaic GPU kernels, chosen so that two programs share a processor's 227 KB of memory."""

import dataclasses

from ..common.chips import PROCESSORS


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Channels of v that one program works on, and how many chunks it has in flight.

    Time and keys go in blocks of 64: the M of one wgmma, and rows of 128 bytes.
    """

    state_values: int  # in the pass over the states, which has a program for each block of keys and of values
    output_values: int  # in the pass over the outputs, which repeats the scores for each block of values
    stages: int  # chunks in flight in the pass over the states
    fused: bool = False  # states and outputs in one walk, which needs a program's state to fit its registers


def choose(batch: int, heads: int, keys: int, values: int, per_channel: bool, bonus: bool = False) -> Tiling:
    """The tiling for padded sizes."""
    wide = 128 if values % 128 == 0 else 64
    if per_channel:  # whose tiles of log-decays take the room
        return Tiling(64, wide, 2)
    fused = keys <= 128 and not bonus and batch * heads * (values // 64) >= PROCESSORS
    if batch * heads * (keys // 64) * (values // wide) < PROCESSORS:
        return Tiling(64, wide, 4, fused)
    return Tiling(wide, wide, 3 if wide == 128 else 4, fused)
