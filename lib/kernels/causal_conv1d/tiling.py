"""Block sizes of the kernels, and how they follow from a call."""

import dataclasses

from ..common.chips import LANES
from ..common.tiling import largest, round_up
from .inputs import Inputs


@dataclasses.dataclass(frozen=True)
class TPUTiling:
    """One grid step convolves `time` tokens of `channels` channels, `rows` tokens at a time.

    The `halo` tokens before a block are a second view of x, so `halo` divides `time`.
    """

    time: int
    channels: int
    rows: int = 32  # int8's tile: the smallest that every operand can be cut at
    halo: int = 32


# The halo of 32 rows is the last 32 tokens of the block before; wider filters would need a longer one.
TPU_WIDEST = 33


def for_tpu(call: Inputs, *, time: int, channels: int) -> TPUTiling:
    """Blocks of at most `time` x `channels`, smaller for smaller calls."""
    _, T, D = call.x.shape
    lanes = round_up(D, LANES)
    channels = largest((channels, 512, 256, LANES), lambda n: n <= channels and lanes % n == 0)
    return TPUTiling(time=min(time, round_up(T, 32)), channels=channels)


@dataclasses.dataclass(frozen=True)
class GPUTiling:
    """A block of 128 threads convolves `time` tokens of `channels` channels, one or two a thread."""

    time: int
    channels: int
    unroll: int = 8  # tokens a loop step


GPU_WIDEST = 16  # the last W inputs, the weights and their gradients' sums stay in registers


def for_gpu(call: Inputs) -> GPUTiling:
    """Rows of 512 bytes if they divide the channels: some 35 KB a tile, so that blocks share a core."""
    _, T, D = call.x.shape
    channels = 256 if call.x.dtype.itemsize == 2 and round_up(D, LANES) % 256 == 0 else LANES
    return GPUTiling(time=min(64, round_up(T, 32)), channels=channels)
