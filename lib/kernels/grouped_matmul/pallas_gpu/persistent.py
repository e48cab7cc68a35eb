"""A program for each processor that goes from tile to tile of a product; what it reads is always on its way.

One warpgroup fetches by TMA, also the first steps of the next tile while the others finish theirs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ...common.hopper import F32, Tiles, launch, swizzled
from .tiling import BAND, DEPTH, ROWS, STORED, Tiling

MEMORY_REGISTERS = 40  # of a thread that fetches; others get what it leaves, of 65,536 in all


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of the result, as a kernel describes it.

    Attributes:
      steps: of its sum, DEPTH long each.
      fetch: `fetch(step, slot)` starts the two copies of a step's operands.
      operands: `operands(slot, warpgroup)`: what wgmma multiplies.
      store: `store(result, warpgroup)`, of ROWS rows in float32.
    """

    steps: Any
    fetch: Callable[[Any, Any], None]
    operands: Callable[[Any, Any], tuple[Any, Any]]
    store: Callable[[Array, Any], None]


def banded(place: Any, rows: Any, columns: int) -> tuple[Any, Any]:
    """(row, column) of a tile: down a band of BAND columns, then the next, so that neighbours share reads."""
    band = lax.div(place, BAND * rows)
    width = jnp.minimum(BAND, columns - band * BAND)
    within = place - band * BAND * rows
    return lax.div(within, width), band * BAND + lax.rem(within, width)


def run(
    name: str,
    operands: list[Array],
    out: jax.ShapeDtypeStruct,
    sizes: Tiling,
    count: Callable[..., Any],
    tile: Callable[..., Tile],
    scratch: dict[str, Any],
    *,
    most: int,
    interpret: bool,
) -> Array:
    """Work on `count(*refs)` tiles.

    Args:
      name: of the kernel.
      operands: arrays in device memory; `refs` are they and the result.
      out: the result.
      sizes: of tiles.
      count: of refs, the number of tiles; at most `most`.
      tile: `tile(number, refs, scratch)`; its copies arrive at `scratch["arrived"]`, a barrier a slot.
      scratch: shared memory, by name.
      most: tiles at most.
      interpret: whether the kernel runs on CPU.
    """
    programs, stages, warpgroups = min(sizes.programs, most), sizes.stages, sizes.warpgroups
    tiles = Tiles(interpret)

    def body(*refs, arrived, released, **shared):
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        turns = lax.div(count(*refs) - program + programs - 1, programs)

        def each(visit: Callable[[Tile, Any], Any]) -> Any:
            """Thread the number of steps done through this program's tiles."""

            def turn(i: Any, done: Any) -> Any:
                found = tile(i * programs + program, refs, shared | {"arrived": arrived})
                visit(found, done)
                return done + found.steps

            return lax.fori_loop(0, turns, turn, jnp.int32(0))

        def fetch_all() -> None:
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def visit(found: Tile, done: Any) -> None:
                def step(k: Any, _: None) -> None:
                    slot = lax.rem(done + k, stages)

                    @pl.when(done + k >= stages)
                    def _wait():
                        plgpu.barrier_wait(released.at[slot])

                    found.fetch(k, slot)

                lax.fori_loop(0, found.steps, step, None)

            done = each(visit)
            # Every phase of a barrier is awaited by someone.
            last = jnp.minimum(done, stages)
            lax.fori_loop(
                done - last, done, lambda s, _: plgpu.barrier_wait(released.at[lax.rem(s, stages)]), None
            )

        def multiply_all() -> None:
            left = (512 - MEMORY_REGISTERS) // warpgroups // 8 * 8
            plgpu.set_max_registers(min(left, 256), action="increase")

            def visit(found: Tile, done: Any) -> None:
                found.store(_sum(found, done), warpgroup)

            each(visit)
            plgpu.wait_smem_to_gmem(0)

        def _sum(found: Tile, done: Any) -> Array:
            shape = ROWS, sizes.columns

            def arrive(step: Any) -> Any:
                slot = lax.rem(done + step, stages)
                plgpu.barrier_wait(arrived.at[slot])
                return slot

            def release(step: Any) -> None:
                plgpu.barrier_arrive(released.at[lax.rem(done + step, stages)])

            if interpret:

                def step(k: Any, total: Array) -> Array:
                    total = tiles.add_products(total, found.operands(arrive(k), warpgroup))
                    release(k)
                    return total

                return lax.fori_loop(0, found.steps, step, tiles.full(shape, 0))

            def accumulate(accumulator) -> Array:
                def step(k: Any, _: None) -> None:
                    plgpu.wgmma(accumulator, *found.operands(arrive(k), warpgroup))
                    plgpu.wgmma_wait(1)  # the step before has been read

                    @pl.when(k > 0)
                    def _release():
                        release(k - 1)

                lax.fori_loop(0, found.steps, step, None)
                plgpu.wgmma_wait(0)

                @pl.when(found.steps > 0)
                def _release_last():
                    release(found.steps - 1)

                return accumulator[...]

            return lax.optimization_barrier(pl.run_scoped(accumulate, plgpu.ACC(shape, F32)))

        lax.cond(warpgroup == warpgroups, fetch_all, multiply_all)

    return plgpu.kernel(
        body,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch
        | {
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "released": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        },
        **launch(name, interpret=interpret),
    )(*operands)


def two_views(shape: tuple[int, ...], dtype: Any, *, interpret: bool) -> Any:
    """A buffer of 128-byte rows for the copy engine at any row, and the same bytes as wgmma's tiles.

    A tile of wgmma has 8 rows, and copies of tiles start at rows that 8 divides. A column of tiles has the
    bytes of plain rows, swizzled; as such they are copied from and to any row.
    """
    assert shape[-1] == DEPTH == STORED
    plain = plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),))
    return swizzled(shape, dtype) if interpret else plgpu.RefUnion(plain, swizzled(shape, dtype))


def views(buffer: Any, *, interpret: bool) -> tuple[Any, Any]:
    """The buffer of `two_views` as rows, and as tiles."""
    return (buffer, buffer) if interpret else tuple(buffer)
