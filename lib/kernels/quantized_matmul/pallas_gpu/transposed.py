"""The gradient of tokens on Hopper: dx = dy W^T from packed codes, which are decoded in registers again.

A program takes one block of rows of W and walks over columns, dx^T += W dy^T. A tile of W has 64 rows; of its
columns the even and the odd ones are operands of their own, and so are those of dy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ....formats.packing import planes
from ...common.arguments import pad_to
from ...common.hopper import F32, Tiles, launch
from ...common.tiling import round_up
from ..inputs import Inputs, Spec
from . import decode
from .kernel import Stack, matrix_of, run_if
from .registers import BYTES, COLUMNS, HALF, load_rows, load_rows_columns, look_up, shifted, store_rows
from .tiling import AT_ONCE, Tiling


def gradient(
    call: Inputs, dy: Array, spec: Spec, sizes: Tiling, stack: Stack | None = None, *, interpret: bool
) -> Array:
    """dy W^T [M, K] in x's dtype; dy [M, N]."""
    (M, N), dtype, element = dy.shape, call.x.dtype, spec.format.element
    block, bits = sizes.block, spec.format.bits
    matrices = 1 if stack is None else stack.matrices
    K = call.codes.shape[0] // matrices * 8 // bits
    steps = N // COLUMNS // sizes.splits
    dy = pad_to(dy.astype(dtype), (round_up(M, sizes.tokens), N))
    whole = sizes.splits == 1
    partial = jax.ShapeDtypeStruct((sizes.splits, dy.shape[0], K), dtype if whole else F32)
    at_once = min(AT_ONCE, sizes.tokens)
    operands: dict[str, Any] = {
        "even": dy[:, ::2],
        "odd": dy[:, 1::2],
        "codes": call.codes,
        "scales": call.scales,
    }
    levels = {"outer": call.outer, "offset": call.offset}  # of coded scales
    operands |= {"zeros": call.zeros} | {
        name: x if x is None else x.reshape(-1) for name, x in levels.items()
    }
    operands["of_tile"] = None if stack is None else stack.of_tile
    operands = {name: array for name, array in operands.items() if array is not None}
    tiles, table = Tiles(interpret), decode.table(element, dtype)
    mine = block // HALF // sizes.warpgroups  # tiles of a warpgroup

    def body(*refs, staged):
        out_ref, given = refs[-1], dict(zip(operands, refs, strict=False))
        split, m, b = (lax.axis_index(axis) for axis in ("split", "m", "block"))
        warpgroup = lax.axis_index("warpgroup")
        matrix, given = matrix_of(given, m, levels)

        def around(pipeline) -> None:
            sums = pipeline(tuple(tiles.full((HALF, sizes.tokens), 0) for _ in range(mine)))
            for t, total in enumerate(sums):
                rows = pl.ds(b * block + (warpgroup * mine + t) * HALF, HALF)
                for first in range(0, sizes.tokens, at_once):
                    slot = staged.at[warpgroup, first // at_once % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of the tokens before the last ones
                    part = total[:, first : first + at_once].astype(partial.dtype)
                    store_rows(part, slot, interpret=interpret)
                    plgpu.commit_smem()
                    tokens = pl.ds(m * sizes.tokens + first, at_once)
                    plgpu.copy_smem_to_gmem(slot, out_ref.at[split, tokens, rows])
            plgpu.wait_smem_to_gmem(0)

        def add_columns(_, *arrived_and_sums) -> Any:
            *arrived, sums = arrived_and_sums
            tile = dict(zip(fetched, arrived, strict=True))

            @functools.cache
            def values(t: int) -> list[Array]:
                """The values of tile t's codes, of its even and its odd columns."""
                place = (warpgroup, mine, t)
                codes, byte = [None, None], 0
                for width, low in planes(bits):
                    rows = block * width // 8
                    plane = tile["codes"].at[pl.ds(byte, rows)]
                    words = load_rows(plane, rows, width, place, interpret=interpret)
                    byte += rows
                    if table is not None:
                        return look_up(words, table, interpret=interpret)[::2]
                    for high in (0, 1):
                        part = shifted(words, 8 * high - low, interpret=interpret)
                        part = part & jnp.uint16(((1 << width) - 1) << low)
                        codes[high] = part if codes[high] is None else codes[high] | part
                return [decode.values(x, element, dtype) for x in codes]

            @functools.cache
            def stored(name: str, t: int) -> tuple[Array, Array]:
                group = sizes.group if sizes.group < block else None
                return load_rows_columns(tile[name], group, (warpgroup, mine, t), interpret=interpret)

            def operand(t: int, high: int) -> tuple[Array, Any]:
                scale = decode.scale(stored("scales", t)[high], spec, given)
                zero = stored("zeros", t)[high].astype(F32) if "zeros" in tile else None
                value = decode.scaled(values(t)[high], scale, zero, dtype)
                return value, tiles.transposed(tile[("even", "odd")[high]])

            if interpret:
                return tiles.add_each(*((y, operand(t, 0), operand(t, 1)) for t, y in enumerate(sums)))

            def multiply(accumulators) -> None:
                for t in range(mine):
                    for high in (0, 1):
                        plgpu.wgmma(accumulators[t], *operand(t, high))
                        plgpu.wgmma_wait(1)  # the operand before has left its registers

            sums = pl.run_state(multiply)(tuple(map(plgpu.ACC.init, sums)))
            return tuple(lax.optimization_barrier(tuple(sums)))

        def spec_of(name: str) -> plgpu.BlockSpec:
            step = lambda n: split * steps + n  # noqa: E731
            if name in ("even", "odd"):
                transforms = plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF)
                return plgpu.BlockSpec((sizes.tokens, HALF), lambda n: (m, step(n)), transforms=transforms)
            if name == "codes":
                shape = block * bits // 8, COLUMNS
                return plgpu.BlockSpec(
                    shape, lambda n: (matrix * (K // block) + b, step(n)), transforms=BYTES
                )
            per_group = max(1, sizes.group // block)
            groups = call.scales.shape[0] // matrices // sizes.groups
            return plgpu.BlockSpec(
                (sizes.groups, COLUMNS), lambda n: (matrix * groups + b // per_group, step(n))
            )

        fetched = [name for name in given if name not in ("of_tile", *levels)]
        pipeline = plgpu.emit_pipeline_warp_specialized(
            add_columns,
            grid=(steps,),
            in_specs=[spec_of(name) for name in fetched],
            memory_registers=32,
            wg_axis="warpgroup",
            num_compute_wgs=sizes.warpgroups,
            max_concurrent_steps=sizes.stages,
            compute_context=around,
        )
        run_if(matrix, lambda: pipeline(*(given[name] for name in fetched)))

    (sums,) = plgpu.kernel(
        body,
        out_type=[partial],
        grid=(sizes.splits, dy.shape[0] // sizes.tokens, K // block),
        grid_names=("split", "m", "block"),
        num_threads=sizes.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={"staged": plgpu.SMEM((sizes.warpgroups, 2, at_once, HALF), partial.dtype)},
        **launch("quantized_matmul_backward", interpret=interpret),
    )(*operands.values())
    sums = sums[0] if whole else jnp.sum(sums, axis=0)
    return sums[:M, : spec.K].astype(dtype)
