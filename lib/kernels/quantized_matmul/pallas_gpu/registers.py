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
        c = _constant
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
        word = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
        shape = TILE.to_mgpu().registers_shape((HALF, rows))
        registers = np.empty((rows // 16, 2, 2), object)
        for k in range(rows // 16):
            four = _load_matrices(base, arith.addi(place, c(2 * k * tile_row)), transposed=True)
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
    from jaxlib.mlir.dialects import llvm, vector

    out = plgpu.ShapeDtypeStruct(words.shape, dtype, layout=QUARTERS)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=(out, out))
    def separate(_, x):
        element = mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
        byte = ir.VectorType.get((4,), element)
        shape = QUARTERS.to_mgpu().registers_shape(words.shape)
        registers = x.registers.reshape(-1, 2, 2)  # 16 rows, which half of them, words beside each other
        results = []
        one = ir.VectorType.get((1,), _i32())
        for selector in (0x6420, 0x7531):
            permuted = (
                _permute(*(llvm.bitcast(_i32(), x) for x in pair), _constant(selector))
                for sixteen in registers
                for pair in zip(*sixteen, strict=True)
            )
            new = [vector.bitcast(byte, vector.broadcast(one, x)) for x in permuted]
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
        c = _constant
        tile_row = ir.MemRefType(ref.type).get_strides_and_offset()[0][0]
        lane, _ = _lane_and_warp()
        first = _first_code(place)
        shift = arith.muli(arith.divui(first, c(rows)), c(width))
        # Matrices 0 and 1: rows that follow each other, 2 and 3: the words after theirs.
        matrix, j = arith.divui(lane, c(8)), arith.remui(lane, c(8))
        tile = arith.addi(arith.divui(arith.remui(first, c(rows)), c(8)), arith.remui(matrix, c(2)))
        row = arith.addi(arith.muli(tile, c(tile_row)), arith.muli(j, c(COLUMNS)))
        later, base = arith.divui(matrix, c(2)), mgpu.utils.memref_ptr(ref)
        word = ir.VectorType.get((2,), ir.IntegerType.get_signless(16))
        registers = np.empty((HALF // 16, 2, 2), object)
        for k in range(HALF // 16):
            chunk = arith.xori(arith.addi(later, c(2 * k)), j)  # the swizzle, of 16 bytes
            four = _load_matrices(base, arith.addi(row, arith.muli(chunk, c(16))), transposed=False)
            for i in range(4):
                registers[k, i // 2, i % 2] = llvm.bitcast(word, arith.shrui(four[i], shift))
        shape = TILE.to_mgpu().registers_shape((HALF, HALF))
        return mgpu.FragmentedArray(
            _registers=registers.reshape(shape), _layout=TILE.to_mgpu(), _is_signed=False
        )

    return load(ref)


def load_rows_columns(
    ref: Any, group: int | None, place: tuple[Any, int, int], *, interpret: bool
) -> tuple[Array, Array]:
    """What is stored [groups, COLUMNS] for groups of rows, at `load_rows`' codes: even columns, odd ones.

    Both are [HALF, HALF] in layout TILE. group: codes of one, a multiple of 16; None: all have the same.
    """
    if interpret:
        warpgroup, many, t = place
        code = (warpgroup * many + t) * HALF + jnp.arange(HALF)
        taken = ref[...][code // group if group else code * 0].reshape(HALF, HALF, 2)
        return taken[:, :, 0], taken[:, :, 1]
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    out = plgpu.ShapeDtypeStruct((HALF, HALF), ref.dtype, layout=TILE)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out, out))
    def load(_, ref):
        index = lambda x: arith.index_cast(ir.IndexType.get(), x)  # noqa: E731
        four = ir.VectorType.get((4,), ir.MemRefType(ref.type).element_type)
        lane, _ = _lane_and_warp()
        row = arith.divui(_first_code(place), _constant(group)) if group else _constant(0)
        column = arith.muli(arith.remui(lane, _constant(4)), _constant(4))
        parts: list[list] = [[], []]
        for j in range(HALF // 8):
            x = vector.load(four, ref, [index(row), index(arith.addi(column, _constant(16 * j)))])
            for parity in (0, 1):  # the same in the rows r and r + 8
                parts[parity] += [vector.shuffle(x, x, [parity, parity + 2])] * 2
        layout, signed = TILE.to_mgpu(), mgpu.utils.is_signed(jnp.dtype(out.dtype))
        return tuple(
            mgpu.FragmentedArray(
                _registers=_array(x, layout.registers_shape((HALF, HALF))),
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
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, vector

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType()))
    def store(_, tile, ref):
        c, index = _constant, lambda x: arith.index_cast(ir.IndexType.get(), x)
        lane, warp = _lane_and_warp()
        row = arith.addi(arith.muli(warp, c(16)), arith.divui(lane, c(4)))
        token = arith.muli(arith.remui(lane, c(4)), c(2))
        for eight, pair in enumerate(tile.registers.reshape(-1, 2)):
            for half, register in enumerate(pair):
                column = index(arith.addi(row, c(8 * half)))
                for i in (0, 1):
                    value = vector.extract(register, [], [i])
                    memref.store(value, ref, [index(arith.addi(token, c(8 * eight + i))), column])

    store(tile, ref)


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


def _thread():
    from jaxlib.mlir.dialects import gpu

    return gpu.thread_id(gpu.Dimension.x)


def _lane_and_warp():
    """This thread's place in its warp, and the warp's in the warpgroup."""
    from jaxlib.mlir.dialects import arith

    thread = arith.index_cast(_i32(), _thread())
    warp = arith.remui(arith.divui(thread, _constant(32)), _constant(4))
    return arith.remui(thread, _constant(32)), warp


def _first_code(place: tuple[Any, int, int]):
    """The first of the 16 codes of this warp."""
    from jaxlib.mlir.dialects import arith

    _, many, t = place
    c, (_, warp) = _constant, _lane_and_warp()
    thread = arith.index_cast(_i32(), _thread())
    tile = arith.addi(arith.muli(arith.divui(thread, c(128)), c(many)), c(t))
    return arith.addi(arith.muli(tile, c(HALF)), arith.muli(warp, c(16)))


def _load_matrices(base, place, *, transposed: bool) -> list:
    """Four matrices of 8 x 8 words, one register of each; lane 8 i + j says where row j of matrix i lies."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    i8 = ir.IntegerType.get_signless(8)
    pointer = llvm.getelementptr(base.type, base, [place], [-(2**31)], i8, llvm.GEPNoWrapFlags.none)
    four = llvm.inline_asm(
        llvm.StructType.get_literal([_i32()] * 4),
        [pointer],
        f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * transposed}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
    )
    return [llvm.extractvalue(_i32(), four, [i]) for i in range(4)]


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
