"""Sizes of the product's tiles on Hopper."""

import math
from typing import NamedTuple

from ....formats.integer import Integer
from ....formats.packing import block_size, planes
from ...common.chips import GPUS, SHARED_MEMORY
from ...common.tiling import round_up
from ..inputs import Inputs, Spec
from .registers import COLUMNS, HALF

PROCESSORS = GPUS["H100 SXM"].processors
TOKENS = 128  # the most that a program takes: accumulators then fill half of the registers
AT_ONCE = 8  # tokens that leave together
STAGES = 6


class Tiling(NamedTuple):
    """The cut of a product into tiles.

    Attributes:
      tokens: of a program.
      warpgroups: of a program, COLUMNS columns of W each.
      block: codes of a column that a step of the pipeline takes: a block of packed ones.
      chunk: codes of those that are decoded and multiplied at once.
      group: rows of W that share a scale, as far as the kernel knows.
      splits: programs that share a sum over K.
      stages: steps whose operands shared memory holds.
      whole_sums: whether sums over all of K are int32, of activations in integers by one group.
    """

    tokens: int
    warpgroups: int
    block: int
    chunk: int
    group: int
    splits: int
    stages: int
    whole_sums: bool = False

    @property
    def columns(self) -> int:
        """Columns of W of a program."""
        return self.warpgroups * COLUMNS

    @property
    def groups(self) -> int:
        """Groups that a block has a part of."""
        return max(1, self.block // self.group)


def tiling(
    call: Inputs, spec: Spec, backward: bool = False, matrices: int = 1
) -> tuple[Tiling | None, str | None]:
    """The sizes for a call, or for its gradient, or None and why there are none.

    `matrices`: as many are multiplied at once, each by as many tokens as the call has.
    """
    bits, (M, _), (rows, N) = spec.format.bits, call.x.shape, call.codes.shape
    K = rows * 8 // bits
    rounded = spec.activations is not None and not backward
    itemsize = 1 if rounded else call.x.dtype.itemsize
    block = math.gcd(256 // itemsize, K) if bits == 8 else block_size(K, bits)
    group = K if spec.group_size >= spec.K or call.scales.shape[0] == 1 else spec.group_size
    chunk = math.gcd(64, group, *(block * width // 8 for width, _ in planes(bits)))
    if N % COLUMNS:
        return None, f"the GPU kernel takes columns by {COLUMNS}, not {N}: W is never copied to pad it"
    if chunk < 16 or block % HALF:
        got = f"K={spec.K} in groups of {group}"
        return None, f"the GPU kernel takes K by 128 (by 64 at 4 bits) in groups of whole 16s, not {got}"
    if block % group and group % block:
        return None, f"the GPU kernel takes groups that divide {block} or are multiples of it, not {group}"
    if rounded and chunk < 64:
        got = f"{bits} bits in groups of {group}"
        return (
            None,
            f"the GPU kernel multiplies rounded activations by 64 codes of a group at once, not {got}",
        )
    many = block // HALF if backward else N // COLUMNS  # what warpgroups share
    warpgroups = 2 if many % 2 == 0 else 1
    whole_sums = rounded and group == K and isinstance(spec.format.element, Integer)
    # Sums of a group have registers of their own.
    most = TOKENS // 2 if rounded and not whole_sums else TOKENS
    groups = max(1, block // group)
    columns, channels = (COLUMNS, COLUMNS) if backward else (warpgroups * COLUMNS, block)

    def step_bytes(tokens: int) -> int:
        per_group = columns * (4 + (call.zeros is not None))
        return tokens * channels * itemsize + block * bits // 8 * columns + groups * per_group

    # One step travels, at least, while another is at work.
    room = (SHARED_MEMORY - 2 * warpgroups * AT_ONCE * COLUMNS * 4 - 4096) // 1024 * 1024
    tokens = min(most, max(8, 1 << (M - 1).bit_length()))
    while tokens > 8 and 2 * round_up(step_bytes(tokens), 1024) > room:
        tokens //= 2
    found = Tiling(tokens, warpgroups, block, HALF if backward else chunk, group, 1, 1, whole_sums)
    programs, steps = (K // block, N // COLUMNS) if backward else (N // columns, K // block)
    splits = _splits(matrices * -(-M // tokens) * programs, steps)
    stages = min(STAGES, steps // splits, room // round_up(step_bytes(tokens), 1024))
    return found._replace(splits=splits, stages=stages), None


def _splits(programs: int, steps: int) -> int:
    """The number of pieces of the sum over K: the fewest that fill the chip, as partial sums are added."""

    def cost(splits: int) -> float:
        waves = -(-programs * splits // PROCESSORS)
        return waves * (steps / splits + 1) + (splits > 1)

    return min((n for n in range(1, steps + 1) if steps % n == 0), key=cost)
