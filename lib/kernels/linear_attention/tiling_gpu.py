"""Block sizes of the Mosaic GPU kernels."""

import dataclasses

# Streaming multiprocessors of the smallest Hopper part; the H200 has 132.
_PROCESSORS = 114


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one call is cut up. A block is 64 in time and in keys: the M of one wgmma, and a 128-byte row."""

    chunk: int  # tokens
    key_block: int  # channels of q and k that one step of a kernel works on
    value_block: int  # channels of v that one program of the state and output kernels keeps


def choose(batch: int, heads: int, keys: int, values: int) -> Tiling:
    """The tiling for padded sizes: wide value blocks where that still leaves a program for each processor."""
    programs = batch * heads * (keys // 64) * (values // 128)
    wide = values % 128 == 0 and programs >= _PROCESSORS
    return Tiling(chunk=64, key_block=64, value_block=128 if wide else 64)
