"""The parts of Mosaic GPU kernels for Hopper: tiles, their products, and the pipeline that fetches them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import compat

F32 = jnp.float32
TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row of a tile
COLS = plgpu.Layout.WGMMA.reduce(0)  # one value a column


def launch(name: str, *, interpret: bool, approx_math: bool = False) -> dict[str, Any]:
    """The options of `plgpu.kernel` that every kernel gives alike."""
    return dict(
        kernel_name=name,
        compiler_params=compat.gpu_params(approx_math=approx_math),
        interpret=compat.gpu_interpret_params() if interpret else False,
    )


def swizzled(shape: tuple[int, ...], dtype: Any, row_bytes: int = 128) -> Any:
    """A buffer that both the copy engine and wgmma read: rows of 128 bytes, or of as few as there are."""
    columns = row_bytes // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(row_bytes)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def along_rows(x: Array, shape: tuple[int, int]) -> Array:
    """x[i] at every [i, j]; x in layout ROWS."""
    return lax.broadcast_in_dim(x, shape, [0])


def along_columns(x: Array, shape: tuple[int, int]) -> Array:
    """x[j] at every [i, j]; x in layout COLS."""
    return lax.broadcast_in_dim(x, shape, [1])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Registers and products inside one kernel.

    Interpreted, there are no register layouts, and a product is XLA's: the interpreters of jax 0.10 to 0.12
    miss parts of `wgmma` (operands in registers) and `pl.run_state`.
    """

    interpret: bool

    def cast(self, x: Array, layout=TILE) -> Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def load(self, ref, layout=TILE) -> Array:
        """The values of a shared-memory buffer as float32 registers."""
        return self.cast(ref[...], layout).astype(F32)

    def transposed(self, ref):
        return ref[...].T if self.interpret else ref.transpose((1, 0))

    def full(self, shape: tuple[int, int], value: int, dtype=F32) -> Array:
        return self.cast(jnp.full(shape, value, dtype))

    def multiply(self, shape: tuple[int, int], *pairs) -> Array:
        """The float32 sum of a @ b over pairs (a, b); a in shared memory or registers, b in shared memory."""
        if self.interpret:
            return self._interpreted(pairs)

        def body(accumulator):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        # Reading an accumulator is a wait without a data dependency: the barrier keeps its uses behind it.
        return lax.optimization_barrier(pl.run_scoped(body, plgpu.ACC(shape, F32)))

    def add_products(self, total: Array, *pairs) -> Array:
        """`total` plus the products, in total's registers."""
        return self.add_each((total, *pairs))[0]

    def add_each(self, *sums) -> tuple[Array, ...]:
        """Several (total, pair, ...) at once: one wait for all."""
        if self.interpret:
            return tuple(total + self._interpreted(pairs) for total, *pairs in sums)

        def body(accumulators):
            for accumulator, (_, *pairs) in zip(accumulators, sums, strict=True):
                for a, b in pairs:
                    plgpu.wgmma(accumulator, a, b)

        totals = tuple(plgpu.ACC.init(total) for total, *_ in sums)
        return tuple(lax.optimization_barrier(pl.run_state(body)(totals)))

    def _interpreted(self, pairs) -> Array:
        def wide(x):
            return (x if isinstance(x, Array) else x[...]).astype(F32)

        first, *rest = (jnp.dot(wide(a), wide(b), precision="highest") for a, b in pairs)
        return sum(rest, first)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A walk over tiles that come by TMA: the next ones travel, each to its slot, while one is at work.

    Attributes:
      steps: tiles of the walk.
      slots: tiles that shared memory holds of each array.
      ahead: tiles that are asked for before step 0, and then as many steps before their own.
      backwards: whether the walk begins at the last tile.
    """

    steps: int
    slots: int
    ahead: int
    backwards: bool = False

    def at(self, step: Any) -> Any:
        """The tile that a step visits."""
        return self.steps - 1 - step if self.backwards else step

    def slot(self, step: Any) -> Any:
        return lax.rem(step, self.slots)

    def start(self, fetch: Callable[[Any, Any], None]) -> None:
        """Call `fetch(tile, slot)`, which copies to shared memory, for the first tiles."""
        for step in range(min(self.ahead, self.steps)):
            fetch(self.at(step), step)

    def refill(self, step: Any, fetch: Callable[[Any, Any], None]) -> None:
        """Fetch the tile `ahead` of a step's, to a slot that every thread has read."""

        @pl.when(step + self.ahead < self.steps)
        def _() -> None:
            fetch(self.at(step + self.ahead), self.slot(step + self.ahead))

    def walk(
        self,
        fetch: Callable[[Any, Any], None],
        visit: Callable[[Any, Any, Any], Any],
        store: Callable[[Any, Any], None],
        carry: Any,
        *,
        arrived: Any,
        stores: int,
    ) -> Any:
        """Thread `carry = visit(step, slot, carry)` through the tiles, after `start`; `ahead` is `slots`.

        Args:
          store: `store(tile, slot)` copies to global memory what `visit` left in the slot.
          arrived: the barriers that `fetch` arrives at, one a slot.
          stores: how many copies `store` starts.
        """

        def one(step: Any, carry: Any) -> Any:
            slot = self.slot(step)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.wait_smem_to_gmem((self.slots - 1) * stores)  # of the step that used this slot before
            carry = visit(step, slot, carry)
            plgpu.commit_smem()  # every thread is past this slot: it may be filled anew
            store(self.at(step), slot)
            self.refill(step, fetch)
            return carry

        return lax.fori_loop(0, self.steps, one, carry)
