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
from .threads import array, constant, first_code, i32, index, lane_and_warp, load_matrices, permute

COLUMNS = 128  # of W, that a warpgroup works on
HALF = COLUMNS // 2
BYTES = plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(COLUMNS)  # of tiles of packed codes
QUARTERS = plgpu.Layout.WGMMA_8BIT  # of operands of one byte


def word_place(lane, warp, tile_row: int, fours: bool):
    """The byte at which `load_words` lets a lane's row of 16 bytes begin, for the first 16 rows.

    Lane 8 i + j says where row j of matrix i lies. Matrices 0 and 1 are words beside each other, 2 and 3 the
    same of later rows. Thread t of four gets rows 2t and 2t + 1 of each; `fours`: 4t to 4t + 3 of both.
    """
    matrix, j = lane // 8, lane % 8
    row = j // 2 * 4 + j % 2 + matrix // 2 * 2 if fours else j + matrix // 2 * 8
    chunk = (warp * 2 + matrix % 2) ^ (row % 8)  # the swizzle, of 16 bytes
    return row // 8 * tile_row + row % 8 * COLUMNS + chunk * 16


def row_place(lane, first, k: int, tile_row: int):
    """The byte at which `load_rows` lets a lane's row of 16 bytes begin, for 32 columns from 32 k on.

    Matrices 0 and 1 are rows that follow each other, from `first` on; 2 and 3 the words after theirs.
    """
    matrix, j = lane // 8, lane % 8
    chunk = (matrix // 2 + 2 * k) ^ j
    return (first // 8 + matrix % 2) * tile_row + j * COLUMNS + chunk * 16


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
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(BYTES),),
        return_type=plgpu.ShapeDtypeStruct((HALF, rows), jnp.uint16, layout=TILE),
    )
    def load(_, ref):
        tile_row = ir.MemRefType(ref.type).get_strides_and_offset()[0][0]  # bytes from 8 rows to the next 8
        place = word_place(*lane_and_warp(), tile_row, fours)
        base = mgpu.utils.memref_ptr(ref)
        word = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
        shape = TILE.to_mgpu().registers_shape((HALF, rows))
        registers = np.empty((rows // 16, 2, 2), object)
        for k in range(rows // 16):
            four = load_matrices(base, place + 2 * k * tile_row, transposed=True)
            for i in range(4):
                registers[k, i // 2, i % 2] = llvm.bitcast(word, four[i])
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
        by = constant(abs(right))
        new = [llvm.bitcast(r.type, move(llvm.bitcast(i32(), r), by)) for r in x.registers.flat]
        return mgpu.FragmentedArray(
            _registers=array(new, x.registers.shape), _layout=x.layout, _is_signed=x.is_signed
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
        c = lambda x: constant(int(np.uint32(x).view(np.int32)))  # noqa: E731
        tables = [[c(x) for x in part] for part in (low, high)]
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(np.dtype(table.dtype)))

        def four(nibbles):
            """The values of the lower four of eight nibbles, two in each of two registers."""
            among = arith.andi(nibbles, c(0x7777))
            which = arith.ori(arith.andi(arith.shrui(nibbles, c(1)), c(0x4444)), c(0x3210))
            low, high = (
                permute(permute(t[0], t[1], among), permute(t[2], t[3], among), which) for t in tables
            )
            return permute(low, high, c(0x5140)), permute(low, high, c(0x7362))

        found = [[], [], [], []]  # type: ignore
        for register in x.registers.flat:
            word = llvm.bitcast(i32(), register)
            rows = zip(four(word), four(arith.shrui(word, c(16))), strict=True)  # of row k and of row k + 1
            for half, (a, b) in enumerate(rows):
                found[2 * half].append(llvm.bitcast(pair, permute(a, b, c(0x5410))))
                found[2 * half + 1].append(llvm.bitcast(pair, permute(a, b, c(0x7632))))
        return tuple(
            mgpu.FragmentedArray(_registers=array(new, x.registers.shape), _layout=x.layout, _is_signed=None)
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
    from jaxlib.mlir.dialects import llvm, vector

    out = plgpu.ShapeDtypeStruct(words.shape, dtype, layout=QUARTERS)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(out, out))
    def separate(_, x):
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        byte = ir.VectorType.get((4,), element)
        shape = QUARTERS.to_mgpu().registers_shape(words.shape)
        registers = x.registers.reshape(-1, 2, 2)  # 16 rows, which half of them, words beside each other
        results = []
        one = ir.VectorType.get((1,), i32())
        for selector in (0x6420, 0x7531):
            permuted = (
                permute(*(llvm.bitcast(i32(), x) for x in pair), constant(selector))
                for sixteen in registers
                for pair in zip(*sixteen, strict=True)
            )
            new = [vector.bitcast(byte, vector.broadcast(one, x)) for x in permuted]
            results.append(
                mgpu.FragmentedArray(
                    _registers=array(new, shape),
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
    from jaxlib.mlir.dialects import vector

    out = plgpu.ShapeDtypeStruct((HALF,), ref.dtype, layout=ROWS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out, out))
    def load(_, ref):
        element = ir.MemRefType(ref.type).element_type
        two, one = (ir.VectorType.get((n,), element) for n in (2, 1))
        lane, warp = lane_and_warp()
        first = warp * 16 + lane // 4
        found = [vector.load(two, ref, [index((first + half) * 2)]) for half in (0, 8)]
        shape = ROWS.to_mgpu().registers_shape((HALF,))
        signed = mgpu.utils.is_signed(jnp.dtype(out.dtype))
        return tuple(
            mgpu.FragmentedArray(
                _registers=array(
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
    from jaxlib.mlir.dialects import vector

    @plgpu.inline_mgpu(arg_types=(TILE, TILE, plgpu.RefType()))
    def store(_, even, odd, ref):
        lane, warp = lane_and_warp()
        word, token = warp * 16 + lane // 4, lane % 4 * 2
        pairs = zip(even.registers.reshape(-1, 2), odd.registers.reshape(-1, 2), strict=True)
        for eight, registers in enumerate(pairs):
            for half, (a, b) in enumerate(zip(*registers, strict=True)):
                column = index((word + 8 * half) * 2)
                for i in (0, 1):
                    both = vector.shuffle(a, b, [i, 2 + i])
                    vector.store(both, ref, [index(token + (8 * eight + i)), column])

    store(even, odd, ref)


def load_rows(ref: Any, rows: int, width: int, place: tuple[Any, int, int], *, interpret: bool) -> Array:
    """The words of HALF rows of codes, of a plane of `width` bits [rows, COLUMNS]: words [HALF, HALF].

    The codes are those from (`place[0]` * `place[1]` + `place[2]`) * HALF on, where the first is the
    warpgroup; they are shifted to the lowest bits of each byte.
    """
    if interpret:
        warpgroup, many, t = place
        code = (warpgroup * many + t) * HALF + jnp.arange(HALF)
        taken = lax.bitcast_convert_type(ref[...], jnp.uint8)[code % rows].astype(jnp.uint16)
        taken = (taken >> (code // rows * width).astype(jnp.uint16)[:, None]).reshape(HALF, HALF, 2)
        return taken[:, :, 0] | (taken[:, :, 1] << 8)
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(BYTES),),
        return_type=plgpu.ShapeDtypeStruct((HALF, HALF), jnp.uint16, layout=TILE),
    )
    def load(_, ref):
        tile_row = ir.MemRefType(ref.type).get_strides_and_offset()[0][0]
        first, (lane, _) = first_code(place, HALF), lane_and_warp()
        shift, base = first // rows * width, mgpu.utils.memref_ptr(ref)
        word = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
        registers = np.empty((HALF // 16, 2, 2), object)
        for k in range(HALF // 16):
            four = load_matrices(base, row_place(lane, first % rows, k, tile_row), transposed=False)
            for i in range(4):
                registers[k, i // 2, i % 2] = llvm.bitcast(word, arith.shrui(four[i], shift.value))
        shape = TILE.to_mgpu().registers_shape((HALF, HALF))
        return mgpu.FragmentedArray(
            _registers=registers.reshape(shape), _layout=TILE.to_mgpu(), _is_signed=False
        )

    return load(ref)


def load_rows_columns(
    ref: Any, group: int | None, place: tuple[Any, int, int], *, interpret: bool
) -> tuple[Array, Array]:
    """Load what is stored [groups, COLUMNS] for groups of rows, at `load_rows`' codes: even, odd columns.

    Both are [HALF, HALF] in layout TILE. group: codes of one, a multiple of 16; None: all have the same.
    """
    if interpret:
        warpgroup, many, t = place
        code = (warpgroup * many + t) * HALF + jnp.arange(HALF)
        taken = ref[...][code // group if group else code * 0].reshape(HALF, HALF, 2)
        return taken[:, :, 0], taken[:, :, 1]
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    out = plgpu.ShapeDtypeStruct((HALF, HALF), ref.dtype, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out, out))
    def load(_, ref):
        four = ir.VectorType.get((4,), ir.MemRefType(ref.type).element_type)
        lane, _ = lane_and_warp()
        row = first_code(place, HALF) // group if group else lane * 0
        parts: list[list] = [[], []]
        for j in range(HALF // 8):
            x = vector.load(four, ref, [index(row), index(lane % 4 * 4 + 16 * j)])
            for parity in (0, 1):  # the same in the rows r and r + 8
                parts[parity] += [vector.shuffle(x, x, [parity, parity + 2])] * 2
        layout, signed = TILE.to_mgpu(), mgpu.utils.is_signed(jnp.dtype(out.dtype))
        return tuple(
            mgpu.FragmentedArray(
                _registers=array(x, layout.registers_shape((HALF, HALF))),
                _layout=layout,
                _is_signed=signed,
            )
            for x in parts
        )

    return load(ref)


def store_rows(tile: Array, ref: Any, *, interpret: bool) -> None:
    """Write a tile [HALF, m] in layout TILE to shared memory [m, HALF]."""
    if interpret:
        ref[...] = tile.T
        return
    from jaxlib.mlir.dialects import memref, vector

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType()))
    def store(_, tile, ref):
        lane, warp = lane_and_warp()
        row, token = warp * 16 + lane // 4, lane % 4 * 2
        for eight, pair in enumerate(tile.registers.reshape(-1, 2)):
            for half, register in enumerate(pair):
                column = index(row + 8 * half)
                for i in (0, 1):
                    value = vector.extract(register, [], [i])
                    memref.store(value, ref, [index(token + (8 * eight + i)), column])

    store(tile, ref)


def _chosen(x: Array, table: np.ndarray) -> Array:
    """table[x], without a constant array, which a kernel can't hold."""
    value = jnp.zeros(x.shape, table.dtype)
    for i, entry in enumerate(table):
        value = jnp.where(x == i, entry, value)
    return value
