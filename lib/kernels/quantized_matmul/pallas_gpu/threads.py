"""Numbers and instructions of one thread, for code that Mosaic GPU inlines."""

from typing import Any

import numpy as np


def i32():
    """The type of registers."""
    from jaxlib.mlir import ir

    return ir.IntegerType.get_signless(32)


def constant(x: int) -> Any:
    """A 32-bit constant."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.constant(i32(), ir.IntegerAttr.get(i32(), x))  # type: ignore[call-arg]


def thread():
    """This thread's place in the block."""
    from jaxlib.mlir.dialects import arith, gpu

    return Word(arith.index_cast(i32(), gpu.thread_id(gpu.Dimension.x)))


def lane_and_warp():
    """This thread's place in its warp, and the warp's in the warpgroup."""
    return thread() % 32, thread() // 32 % 4


def first_code(place: tuple[Any, int, int], tile: int):
    """The first of the 16 codes of this warp, in `load_rows`: tiles have `tile` of them."""
    _, many, t = place
    return (thread() // 128 * many + t) * tile + thread() // 32 % 4 * 16


def index(x):
    """A Word as an index."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.index_cast(ir.IndexType.get(), x.value)


class Word:
    """A 32-bit number of a thread, with the operators that places need; the other operand may be an int."""

    def __init__(self, value):
        self.value = value

    def _with(self, operation: str, other):
        from jaxlib.mlir.dialects import arith

        other = other.value if isinstance(other, Word) else constant(other)
        return Word(getattr(arith, operation)(self.value, other))

    def __add__(self, other):
        return self._with("addi", other)

    def __mul__(self, other):
        return self._with("muli", other)

    def __floordiv__(self, other):
        return self._with("divui", other)

    def __mod__(self, other):
        return self._with("remui", other)

    def __xor__(self, other):
        return self._with("xori", other)


def load_matrices(base, place, *, transposed: bool) -> list:
    """Four matrices of 8 x 8 words, one register of each; lane 8 i + j says where row j of matrix i lies."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i8 = ir.IntegerType.get_signless(8)
    pointer = llvm.getelementptr(base.type, base, [place.value], [-(2**31)], i8, llvm.GEPNoWrapFlags.none)
    four = llvm.inline_asm(
        llvm.StructType.get_literal([i32()] * 4),
        [pointer],
        f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * transposed}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(i32(), four, [i]) for i in range(4)]


def permute(a, b, selector):
    """Four of the eight bytes of two words, by the lower four nibbles of another."""
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(
        i32(), [a, b, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", has_side_effects=False
    )


def array(items: list, shape: tuple[int, ...]) -> np.ndarray:
    """Registers as a FragmentedArray has them."""
    found = np.empty(len(items), object)
    found[:] = items
    return found.reshape(shape)
