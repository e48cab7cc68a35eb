"""The product on Hopper: packed codes stream through shared memory, and registers hold W as wgmma's operand.

A program multiplies a tile of tokens by a tile of columns over some rows of W. One warpgroup fetches by TMA.
Each of the others decodes the codes of COLUMNS columns, a chunk of rows at a time, and multiplies the chunk
by the tokens, y^T += W^T x^T, while it decodes the next.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ....formats.packing import planes
from ...common.arguments import pad_to
from ...common.hopper import COLS, F32, Tiles, along_columns, along_rows, launch
from ...common.tiling import round_up
from ..inputs import Inputs, Spec
from . import decode, narrow
from .registers import BYTES, COLUMNS, HALF, load_columns, load_words, look_up, store_product
from .tiling import AT_ONCE, Tiling

LEAST = 32  # float32 values that can be copied to shared memory: 128 bytes


class Stack(NamedTuple):
    """Matrices W one below the other, as the call has them: each tile of tokens multiplies one.

    Attributes:
      of_tile: int32, the number of a tile's matrix; -1 for a tile that is left out, results unset.
      matrices: how many there are.
    """

    of_tile: Array
    matrices: int


def product(call: Inputs, spec: Spec, sizes: Tiling, stack: Stack | None = None, *, interpret: bool) -> Array:
    """x W + b [M, N] in x's dtype."""
    (M, _), (rows, N) = call.x.shape, call.codes.shape
    matrices = 1 if stack is None else stack.matrices
    element, dtype = spec.format.element, call.x.dtype
    steps = rows // matrices * 8 // spec.format.bits // sizes.block // sizes.splits
    x, of_tokens = narrow.tokens(call, spec)
    x = pad_to(x, (round_up(M, sizes.tokens), steps * sizes.splits * sizes.block))
    whole = sizes.splits == 1
    bias = call.bias if whole else None  # of partial sums it is added after
    last = {} if bias is None else {"bias": bias[None]}  # [1, N]: what is needed once all is summed
    if sizes.whole_sums:
        last["scales"] = call.scales
    partial = jax.ShapeDtypeStruct((sizes.splits, x.shape[0], N), dtype if whole else F32)
    at_once = min(AT_ONCE, sizes.tokens)
    levels = {"outer": call.outer, "offset": call.offset}  # of coded scales
    operands = {"x": x, "codes": call.codes, "scales": call.scales, "zeros": call.zeros} | last
    if of_tokens is not None:
        operands["tokens"] = pad_to(of_tokens, (x.shape[0] + LEAST,))
    operands |= {name: x if x is None else x.reshape(-1) for name, x in levels.items()}
    operands["of_tile"] = None if stack is None else stack.of_tile
    operands = {name: array for name, array in operands.items() if array is not None}
    tiles, table = Tiles(interpret), decode.table(element, dtype)
    bytes_of = [sizes.block * width // 8 for width, _ in planes(element.bits)]  # of each plane of a block
    starts, run = [0, *itertools.accumulate(bytes_of)], min(bytes_of)

    def body(*refs, staged, last_tiles=(), token_tile=None, last_arrived=None):
        out_ref, given = refs[-1], dict(zip(operands, refs, strict=False))
        split, m, n = (lax.axis_index(axis) for axis in ("split", "m", "n"))
        warpgroup = lax.axis_index("warpgroup")
        matrix, given = matrix_of(given, m, levels)
        mine = pl.ds(warpgroup * COLUMNS, COLUMNS)
        columns = pl.ds((n * sizes.warpgroups + warpgroup) * COLUMNS, COLUMNS)

        def around(pipeline) -> None:
            """The start and the end of the sum over this program's blocks."""
            for name, copy in zip(last, last_tiles, strict=True):
                arrived = last_arrived.at[warpgroup]
                plgpu.copy_gmem_to_smem(given[name].at[0, columns], copy.at[warpgroup], arrived)
            if token_tile is not None:
                tokens = given["tokens"].at[pl.ds(m * sizes.tokens, max(LEAST, sizes.tokens))]
                plgpu.copy_gmem_to_smem(tokens, token_tile.at[warpgroup], last_arrived.at[warpgroup])
            shape = HALF, sizes.tokens
            dtype_of_sums = jnp.int32 if sizes.whole_sums else F32
            sums = pipeline(tuple(tiles.full(shape, 0, dtype_of_sums) for _ in range(2)))
            if last_arrived is not None:
                plgpu.barrier_wait(last_arrived.at[warpgroup])
            sums = [y.astype(F32) for y in sums]
            found = {
                name: load_columns(copy.at[warpgroup], interpret=interpret)
                for name, copy in zip(last, last_tiles, strict=True)
            }
            if "scales" in found:
                scales = [decode.scale(x, spec, given) * narrow.unit(element) for x in found["scales"]]
                sums = [y * along_rows(s, shape) for y, s in zip(sums, scales, strict=True)]
            if token_tile is not None:
                wide = along_columns(
                    tiles.load(token_tile.at[warpgroup, pl.ds(0, sizes.tokens)], COLS), shape
                )
                sums = [y * wide for y in sums]
            if "bias" in found:
                added = (along_rows(b.astype(F32), shape) for b in found["bias"])
                sums = [y + b for y, b in zip(sums, added, strict=True)]
            for first in range(0, sizes.tokens, at_once):
                slot = staged.at[warpgroup, first // at_once % 2]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of the tokens before the last ones
                even, odd = (y[:, first : first + at_once].astype(partial.dtype) for y in sums)
                store_product(even, odd, slot, interpret=interpret)
                plgpu.commit_smem()
                tokens = pl.ds(m * sizes.tokens + first, at_once)
                plgpu.copy_smem_to_gmem(slot, out_ref.at[split, tokens, columns])
            plgpu.wait_smem_to_gmem(0)

        def add_block(_, *arrived_and_sums) -> Any:
            *arrived, sums = arrived_and_sums
            tile = dict(zip(fetched, arrived, strict=True))

            @functools.cache
            def words(plane: int, byte: int) -> Array:
                rows = pl.ds(starts[plane] + byte, sizes.chunk)
                codes = tile["codes"].at[rows, mine]
                return load_words(codes, sizes.chunk, fours=of_tokens is not None, interpret=interpret)

            if of_tokens is not None:
                of_groups = functools.partial(
                    _scales, tile, mine=mine, spec=spec, given=given, interpret=interpret
                )
                return narrow.add_block(words, tile["x"], of_groups, sums, spec, sizes, tiles)

            @functools.cache
            def looked_up(byte: int) -> list[Array]:
                return look_up(words(0, byte), table, interpret=interpret)

            scales = [
                _scales(tile, group, mine=mine, spec=spec, given=given, interpret=interpret)
                for group in range(sizes.groups)
            ]

            def values(first: int, high: int) -> Array:
                if table is not None:
                    return looked_up(first % run)[2 * high + first // run]
                codes = decode.take(words, element.bits, sizes.block, first, high, interpret=interpret)
                return decode.values(codes, element, dtype)

            def operand(first: int, high: int) -> tuple[Array, Any]:
                """Some rows of the even or the odd columns, and the tokens' channels that they multiply."""
                scale, zero = (x and x[high] for x in scales[first // sizes.group])
                channels = tile["x"].at[:, pl.ds(first, sizes.chunk)]
                value = decode.scaled(values(first, high), scale, zero, dtype)
                return value, tiles.transposed(channels)

            # Those that lie in the same bytes follow each other.
            chunks = sorted(range(0, sizes.block, sizes.chunk), key=lambda k: k % run)
            if interpret:
                return tiles.add_each(*((y, *(operand(k, h) for k in chunks)) for h, y in enumerate(sums)))

            def multiply(accumulators) -> None:
                for k in chunks:
                    for high in (0, 1):
                        plgpu.wgmma(accumulators[high], *operand(k, high))
                        plgpu.wgmma_wait(1)  # the operand before has left its registers

            sums = pl.run_state(multiply)(tuple(map(plgpu.ACC.init, sums)))
            return tuple(lax.optimization_barrier(sums))

        def spec_of(name: str) -> plgpu.BlockSpec:
            step = lambda k: split * steps + k  # noqa: E731
            if name == "x":
                row = sizes.chunk * x.dtype.itemsize
                transforms = plgpu.TilingTransform((8, sizes.chunk)), plgpu.SwizzleTransform(row)
                shape = sizes.tokens, sizes.block
                return plgpu.BlockSpec(shape, lambda k: (m, step(k)), transforms=transforms)
            if name == "codes":
                shape, blocks = (sizes.block * spec.format.bits // 8, sizes.columns), steps * sizes.splits
                return plgpu.BlockSpec(shape, lambda k: (matrix * blocks + step(k), n), transforms=BYTES)
            per_group = sizes.group // sizes.block if sizes.group > sizes.block else 1
            groups = call.scales.shape[0] // matrices // sizes.groups
            return plgpu.BlockSpec(
                (sizes.groups, sizes.columns), lambda k: (matrix * groups + step(k) // per_group, n)
            )

        fetched = [name for name in given if name not in ("tokens", "of_tile", *last, *levels)]
        pipeline = plgpu.emit_pipeline_warp_specialized(
            add_block,
            grid=(steps,),
            in_specs=[spec_of(name) for name in fetched],
            memory_registers=32,
            wg_axis="warpgroup",
            num_compute_wgs=sizes.warpgroups,
            max_concurrent_steps=sizes.stages,
            compute_context=around,
        )
        run_if(matrix, lambda: pipeline(*(given[name] for name in fetched)))

    scratch: dict[str, Any] = {"staged": plgpu.SMEM((sizes.warpgroups, 2, at_once, COLUMNS), partial.dtype)}
    if last or of_tokens is not None:
        arrivals = len(last) + (of_tokens is not None)
        scratch["last_arrived"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=sizes.warpgroups)
        scratch["last_tiles"] = [plgpu.SMEM((sizes.warpgroups, COLUMNS), x.dtype) for x in last.values()]
    if of_tokens is not None:
        scratch["token_tile"] = plgpu.SMEM((sizes.warpgroups, max(LEAST, sizes.tokens)), F32)
    (sums,) = plgpu.kernel(
        body,
        out_type=[partial],
        grid=(sizes.splits, x.shape[0] // sizes.tokens, N // sizes.columns),
        grid_names=("split", "m", "n"),
        num_threads=sizes.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        **launch("quantized_matmul", interpret=interpret),
    )(*operands.values())
    if whole:
        return sums[0, :M]
    y = jnp.sum(sums[:, :M], axis=0)
    return (y if call.bias is None else y + call.bias.astype(F32)).astype(dtype)


def matrix_of(given: dict, m: Any, levels: dict) -> tuple[Any, dict]:
    """The number of tile m's matrix, and the operands with that one's levels of scales alone."""
    if "of_tile" not in given:
        return 0, given
    matrix = given["of_tile"][m]
    own = {name: given[name].at[pl.ds(matrix, 1)] for name in levels if name in given}
    return matrix, given | own


def run_if(matrix: Any, run: Callable[[], None]) -> None:
    """Run a program for its matrix, if it has one."""
    if isinstance(matrix, int):
        run()
    else:
        pl.when(matrix >= 0)(run)


def _scales(
    tile: dict, group: int, *, mine: Any, spec: Spec, given: dict, interpret: bool
) -> tuple[list[Array], list[Array] | None]:
    """The scales and zeros, if any, of a group: float32, of the even columns and of the odd ones."""
    stored = load_columns(tile["scales"].at[group, mine], interpret=interpret)
    scales = [decode.scale(x, spec, given) for x in stored]
    if "zeros" not in tile:
        return scales, None
    zeros = load_columns(tile["zeros"].at[group, mine], interpret=interpret)
    return scales, [z.astype(F32) for z in zeros]
