"""Block sizes of the kernels, and how they follow from a call."""

import dataclasses
from typing import NamedTuple

from ..common.chips import LANES, PROCESSORS, REGISTERS, SHARED_MEMORY, SUBLANES, VMEM_LIMIT
from ..common.tiling import Limit, round_up, search
from .cells import Cell


@dataclasses.dataclass(frozen=True)
class TPUTiling:
    """A program walks `batch` sequences of one head, `time` tokens a grid step, `columns` channels at once.

    R stays in VMEM as long as the head does.
    """

    batch: int
    time: int
    columns: int


class Shape(NamedTuple):
    """The sizes that a tiling depends on."""

    batch: int
    time: int
    heads: int
    size: int
    itemsize: int
    packed: bool


def for_tpu(cell: Cell, shape: Shape, *, backward: bool) -> tuple[TPUTiling | None, str | None]:
    """The tiling, or None and why none fits."""
    D, item = round_up(shape.size, LANES), shape.itemsize
    sublanes = SUBLANES * 4 // item
    rows = round_up(shape.batch, sublanes)
    G, P, S, R = cell.gates, cell.pre_activations, len(cell.states), len(cell.reads)

    def vmem(batch: int, time: int, columns: int) -> int:
        """Every block but R twice, for the copies that overlap; states; what a step has in its hands."""
        forth = G * item + item + R * 4  # what comes and what goes
        back = 2 * G * item + 2 * item + P * 2 + R * 4 + P * item  # pre-activations are there once
        token = back if backward else forth
        token = token * D + (LANES * 4 if shape.packed else 0)
        blocks = 2 * time * batch * token + G * D * D * item
        states = (2 * 2 + 1) * S * batch * D * 4 + batch * D * item
        hands = 2 * batch * 4 * (P * D + time * (G + P) * LANES if backward else G * columns)
        return blocks + states + hands

    def cost(batch: int, time: int, columns: int) -> tuple[int, int]:
        """Cycles of all steps, about: R's tiles enter the matrix unit, rows pass, results come out late."""
        tiles = G * (D // LANES) ** 2
        step = tiles * (LANES // SUBLANES + batch // SUBLANES) + 200 * (D // columns)
        return (-(-rows // batch) * step * shape.time, -time)

    found = search(
        {
            "batch": [b for b in range(sublanes, 257, sublanes) if b <= rows],
            "time": [t for t in (1, 2, 4, 8, 16, 32, 64) if t < 2 * shape.time],
            "columns": [c for c in range(LANES, D + 1, LANES) if D % c == 0],
        },
        [
            Limit("bytes of VMEM", VMEM_LIMIT, vmem),
            # More are a loop: a step that is written out whole must fit the instruction memory.
            Limit(
                "values of R in one product", max(2**20, G * D * LANES), lambda columns, **_: G * D * columns
            ),
        ],
        cost,
    )
    if found.sizes is None:
        return None, f"heads of {shape.size} channels with {G} gates take {found.reason}"
    return TPUTiling(**found.sizes), None


SHARED_LIMIT = SHARED_MEMORY - 1024  # room for barriers
VALUE_REGISTERS = REGISTERS - 31  # addresses need some
ROWS = 64  # channels that one instruction of the tensor cores takes


@dataclasses.dataclass(frozen=True)
class GPUTiling:
    """A block of 128 threads walks `batch` sequences of one head, with `stages` tokens on their way to it."""

    batch: int
    stages: int


def for_gpu(cell: Cell, shape: Shape, *, backward: bool) -> tuple[GPUTiling | None, str | None]:
    """The tiling, or None and why none fits. R's bfloat16 values fill most of the shared memory."""
    D = round_up(shape.size, ROWS)
    G, P, S, R = cell.gates, cell.pre_activations, len(cell.states), len(cell.reads)

    def shared(batch: int, stages: int) -> int:
        if backward:  # pre-activations, reads, dh on their way in; the gradient, twice
            token, steady, bias = P * 4 + R * 4 + 2, 2 * P * 2, 0
        else:  # gates; h twice, states
            token, steady, bias = G * 2, 2 * 2 + S * 4, G * D * 4
        values = stages * (token + 2 * shape.packed) + steady
        return G * D * D * 2 + bias + values * D * batch

    def registers(batch: int, **_: int) -> int:
        """The states of all channels, and what a step holds of ROWS of them."""
        return (D // ROWS * S + P + G + R + S + 4) * batch // 2

    def cost(batch: int, stages: int) -> tuple[int, int]:
        """Cycles, about: R is read from shared memory at 128 bytes a cycle; 128 threads do the pointwise."""
        step = G * D * D * 2 * max(1, batch // 32) // 128 + D * batch * (P + S) // 4 + 1500
        waves = -(-(-(-shape.batch // batch) * shape.heads) // PROCESSORS)
        return waves * step, -stages

    found = search(
        {"batch": [16, 32, 64], "stages": [1, 2, 3]},
        [
            Limit("bytes of shared memory", SHARED_LIMIT, shared),
            Limit("registers", VALUE_REGISTERS, registers),
            Limit("rows of an array", 2**31 - 1, lambda **_: shape.time * shape.heads * P * D),
        ],
        cost,
    )
    if found.sizes is None:
        return None, f"heads of {shape.size} channels with {G} gates take {found.reason}"
    return GPUTiling(**found.sizes), None
