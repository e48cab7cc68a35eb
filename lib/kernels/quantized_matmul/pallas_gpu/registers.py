"""The parts of the low-bit product that Mosaic GPU has no name for: how bytes reach registers and leave them.

A warpgroup holds the transposed product, 128 columns of W as two tiles of 64 rows: the even columns, the odd
ones. Columns 2r and 2r + 1 of a row of bytes are one 16-bit word. `ldmatrix.trans` brings the words of rows k
and k + 1 to one register, where they lie as wgmma wants two neighbours of its first operand's row r. So codes
become values by shifts and masks, and none moves between threads: the idea of MARLIN (arXiv 2408.11743). Its
offline shuffle is not needed, since packing puts the codes of a byte far apart.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...common.hopper import ROWS, TILE

COLUMNS = 128  # of W, that a warpgroup works on
HALF = COLUMNS // 2
BYTES = plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(COLUMNS)  # of tiles of packed codes
QUARTERS = plgpu.Layout.WGMMA_8BIT  # of operands of one byte


def load_words(ref: Any, rows: int, *, fours: bool, interpret: bool) -> Array:
    """Bytes [rows, COLUMNS] of shared memory as words [HALF, rows] of two columns, the even one lowest.

    Args:
      ref: uint8 or int8, laid out as BYTES.
      rows: a multiple of 16.
      fours: threads get rows by fours, for operands of one byte (`as_bytes`), not by twos.
      interpret: whether the kernel runs on CPU.
    """
    if interpret:
        pairs = lax.bitcast_convert_type(ref[...], jnp.uint8).astype(jnp.uint16).T.reshape(HALF, 2, rows)
        return pairs[:, 0] | (pairs[:, 1] << 8)
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(BYTES),),
        return_type=plgpu.ShapeDtypeStruct((HALF, rows), jnp.uint16, layout=TILE),
    )
    def load(_, ref):
        i32, i8, c = _i32(), ir.IntegerType.get_signless(8), _constant
        tile_row = ir.MemRefType(ref.type).get_strides_and_offset()[0][0]  # bytes from 8 rows to the next 8
        lane, warp = _lane_and_warp()
        # Lane 8 i + j says where row j of matrix i lies; matrices 0 and 1: words beside each other, 2 and 3:
        # the same of later rows.
        matrix, j = arith.divui(lane, c(8)), arith.remui(lane, c(8))
        later, beside = arith.divui(matrix, c(2)), arith.remui(matrix, c(2))
        if fours:  # thread t, which gets the rows 2t and 2t + 1 of a matrix, gets 4t, ..., 4t + 3 of both
            pair, odd = arith.divui(j, c(2)), arith.remui(j, c(2))
            row = arith.addi(arith.addi(arith.muli(pair, c(4)), odd), arith.muli(later, c(2)))
        else:
            row = arith.addi(j, arith.muli(later, c(8)))
        in_tile = arith.remui(row, c(8))
        chunk = arith.xori(arith.addi(arith.muli(warp, c(2)), beside), in_tile)  # the swizzle, of 16 bytes
        place = arith.addi(arith.muli(in_tile, c(COLUMNS)), arith.muli(chunk, c(16)))
        place = arith.addi(place, arith.muli(arith.divui(row, c(8)), c(tile_row)))
        base = mgpu.utils.memref_ptr(ref)

        def at(base, places, offset):
            return llvm.getelementptr(base.type, base, places, [offset], i8, llvm.GEPNoWrapFlags.none)

        base = at(base, [place], -(2**31))  # an index of the list
        word = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
        shape = TILE.to_mgpu().registers_shape((HALF, rows))
        registers = np.empty((rows // 16, 2, 2), object)
        for k in range(rows // 16):
            four = llvm.inline_asm(
                llvm.StructType.get_literal([i32] * 4),
                [at(base, [], 2 * k * tile_row)],
                "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,r",
                has_side_effects=True,
            )
            for i in range(4):
                registers[k, i // 2, i % 2] = llvm.bitcast(word, llvm.extractvalue(i32, four, [i]))
        return mgpu.FragmentedArray(
            _registers=registers.reshape(shape), _layout=TILE.to_mgpu(), _is_signed=False
        )

    return load(ref)


def shifted(words: Array, right: int, *, interpret: bool) -> Array:
    """Shift words, left if `right` < 0. Bits that come from a neighbouring word are to be masked off."""
    if right == 0:
        return words
    if interpret:
        return words >> right if right > 0 else words << -right
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir.dialects import arith, llvm

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(words.shape, words.dtype, layout=TILE)
    )
    def shift(_, x):  # two words of a register at once, for which LLVM has no instruction
        move = arith.shrui if right > 0 else arith.shli
        by = _constant(abs(right))
        new = [llvm.bitcast(r.type, move(llvm.bitcast(_i32(), r), by)) for r in x.registers.flat]
        return mgpu.FragmentedArray(
            _registers=_array(new, x.registers.shape), _layout=x.layout, _is_signed=x.is_signed
        )

    return shift(words)


def look_up(words: Array, table: np.ndarray, *, interpret: bool) -> list[Array]:
    """The values that the four nibbles of each word stand for, lowest first: arrays like `words`.

    Args:
      words: the words of a plane of four bits.
      table: 16 values of two bytes each.
      interpret: whether the kernel runs on CPU.
    """
    if interpret:
        nibbles = [(words >> place) & 15 for place in (0, 4, 8, 12)]
        return [_chosen(x, table) for x in nibbles]
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    # `prmt` picks four of eight bytes by four nibbles: a table of 16 bytes takes two, and one to choose.
    low, high = np.ascontiguousarray(table.view(np.uint8).reshape(16, 2).T).view(np.uint32)
    out = plgpu.ShapeDtypeStruct(words.shape, table.dtype, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(out,) * 4)
    def look(_, x):
        c = lambda x: _constant(int(np.uint32(x).view(np.int32)))  # noqa: E731
        tables = [[c(x) for x in part] for part in (low, high)]
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(np.dtype(table.dtype)))

        def four(nibbles):
            """The values of the lower four of eight nibbles, two in each of two registers."""
            among = arith.andi(nibbles, c(0x7777))
            which = arith.ori(arith.andi(arith.shrui(nibbles, c(1)), c(0x4444)), c(0x3210))
            low, high = (
                _permute(_permute(t[0], t[1], among), _permute(t[2], t[3], among), which) for t in tables
            )
            return _permute(low, high, c(0x5140)), _permute(low, high, c(0x7362))

        found = [[], [], [], []]  # type: ignore
        for register in x.registers.flat:
            word = llvm.bitcast(_i32(), register)
            rows = zip(four(word), four(arith.shrui(word, c(16))), strict=True)  # of row k and of row k + 1
            for half, (a, b) in enumerate(rows):
                found[2 * half].append(llvm.bitcast(pair, _permute(a, b, c(0x5410))))
                found[2 * half + 1].append(llvm.bitcast(pair, _permute(a, b, c(0x7632))))
        return tuple(
            mgpu.FragmentedArray(_registers=_array(new, x.registers.shape), _layout=x.layout, _is_signed=None)
            for new in found
        )

    return list(look(words))


def as_bytes(words: Array, dtype: Any, *, interpret: bool) -> tuple[Array, Array]:
    """The low and the high bytes of words that were loaded by fours, as two operands of wgmma."""
    if interpret:
        low, high = (words & 0xFF).astype(jnp.uint8), (words >> 8).astype(jnp.uint8)
        return lax.bitcast_convert_type(low, dtype), lax.bitcast_convert_type(high, dtype)
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    out = plgpu.ShapeDtypeStruct(words.shape, dtype, layout=QUARTERS)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(out, out))
    def separate(_, x):
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        byte = ir.VectorType.get((4,), element)
        shape = QUARTERS.to_mgpu().registers_shape(words.shape)
        registers = x.registers.reshape(-1, 2, 2)  # 16 rows, which half of them, words beside each other
        results = []
        for selector in (0x6420, 0x7531):
            new = [
                llvm.bitcast(byte, _permute(*(llvm.bitcast(_i32(), x) for x in pair), _constant(selector)))
                for sixteen in registers
                for pair in zip(*sixteen, strict=True)
            ]
            results.append(
                mgpu.FragmentedArray(
                    _registers=_array(new, shape),
                    _layout=QUARTERS.to_mgpu(),
                    _is_signed=mgpu.utils.is_signed(jnp.dtype(dtype)),
                )
            )
        return tuple(results)

    return separate(words)


def load_columns(ref: Any, *, interpret: bool) -> tuple[Array, Array]:
    """Values [COLUMNS] of shared memory, of the even columns and of the odd ones: [HALF] in layout ROWS."""
    if interpret:
        both = ref[...].reshape(HALF, 2)
        return both[:, 0], both[:, 1]
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    out = plgpu.ShapeDtypeStruct((HALF,), ref.dtype, layout=ROWS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out, out))
    def load(_, ref):
        element = ir.MemRefType(ref.type).element_type
        two, one = (ir.VectorType.get((n,), element) for n in (2, 1))
        lane, warp = _lane_and_warp()
        first = arith.addi(arith.muli(warp, _constant(16)), arith.divui(lane, _constant(4)))
        found = []
        for half in (0, 8):
            place = arith.muli(arith.addi(first, _constant(half)), _constant(2))
            found.append(vector.load(two, ref, [arith.index_cast(ir.IndexType.get(), place)]))
        shape = ROWS.to_mgpu().registers_shape((HALF,))
        signed = mgpu.utils.is_signed(jnp.dtype(out.dtype))
        return tuple(
            mgpu.FragmentedArray(
                _registers=_array(
                    [vector.extract_strided_slice(one, x, [parity], [1], [1]) for x in found], shape
                ),
                _layout=ROWS.to_mgpu(),
                _is_signed=signed,
            )
            for parity in (0, 1)
        )

    return load(ref)


def store_product(even: Array, odd: Array, ref: Any, *, interpret: bool) -> None:
    """Write the tiles [HALF, m] of even and of odd columns, in layout TILE, to shared memory [m, COLUMNS]."""
    if interpret:
        ref[...] = jnp.stack([even, odd], axis=1).reshape(COLUMNS, even.shape[1]).T
        return
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    @plgpu.inline_mgpu(arg_types=(TILE, TILE, plgpu.RefType()))
    def store(_, even, odd, ref):
        c, index = _constant, lambda x: arith.index_cast(ir.IndexType.get(), x)
        lane, warp = _lane_and_warp()
        word = arith.addi(arith.muli(warp, c(16)), arith.divui(lane, c(4)))
        token = arith.muli(arith.remui(lane, c(4)), c(2))
        pairs = zip(even.registers.reshape(-1, 2), odd.registers.reshape(-1, 2), strict=True)
        for eight, registers in enumerate(pairs):
            for half, (a, b) in enumerate(zip(*registers, strict=True)):
                column = index(arith.muli(arith.addi(word, c(8 * half)), c(2)))
                for i in (0, 1):
                    both = vector.shuffle(a, b, [i, 2 + i])
                    vector.store(both, ref, [index(arith.addi(token, c(8 * eight + i))), column])

    store(even, odd, ref)


def _chosen(x: Array, table: np.ndarray) -> Array:
    """table[x], without a constant array, which a kernel can't hold."""
    value = jnp.zeros(x.shape, table.dtype)
    for i, entry in enumerate(table):
        value = jnp.where(x == i, entry, value)
    return value


def _i32():
    from jaxlib.mlir import ir

    return ir.IntegerType.get_signless(32)


def _constant(x: int):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), x))  # type: ignore[call-arg]


def _lane_and_warp():
    """This thread's place in its warp, and the warp's in the warpgroup."""
    from jaxlib.mlir.dialects import arith, gpu

    thread = arith.index_cast(_i32(), gpu.thread_id(gpu.Dimension.x))
    warp = arith.remui(arith.divui(thread, _constant(32)), _constant(4))
    return arith.remui(thread, _constant(32)), warp


def _permute(a, b, selector):
    """Four of the eight bytes of two words, by the lower four nibbles of another."""
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(
        _i32(), [a, b, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", has_side_effects=False
    )


def _array(items: list, shape: tuple[int, ...]) -> np.ndarray:
    found = np.empty(len(items), object)
    found[:] = items
    return found.reshape(shape)
