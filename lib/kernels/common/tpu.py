"""What TPU kernels are put together from: a launch, the walk over time, the layout of heads, products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

F32 = jnp.float32


def dot(a: Array, b: Array, axes: str = "nn") -> Array:
    """Matrix product in float32: "nn" is a b, "nt" is a b^T, "tn" is a^T b."""
    contract = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[axes]
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=F32)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """The number of each place along `axis`."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


class Launch:
    """One kernel launch being put together: operands, results and scratch, each by its name.

    The kernel gets the refs as keywords: "x" as `x_ref`. One that was given no array is not among them.

    Attributes:
      name: the kernel's, for profiles.
      grid: its sizes; the last axis varies fastest.
      semantics: of each axis of the grid, "parallel" or "arbitrary" (in order).
      vmem_limit: bytes of VMEM that the kernel may hold; None: the compiler's default, 16 MiB on v5e.
    """

    def __init__(
        self,
        name: str,
        grid: tuple[int, ...],
        semantics: Sequence[str],
        *,
        interpret: bool,
        vmem_limit: int | None = None,
    ):
        self.name, self.grid, self.interpret = name, grid, interpret
        self.compiler_params = pltpu.CompilerParams(
            dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem_limit
        )
        self.operands: dict[str, tuple[Array, pl.BlockSpec]] = {}
        self.results: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
        self.scratch: dict[str, Any] = {}
        self.aliases: dict[int, int] = {}

    def add(self, name: str, x: Array | None, spec: pl.BlockSpec) -> None:
        """Give the kernel an array, in blocks of `spec`; None: nothing."""
        if x is not None:
            self.operands[name] = x, spec

    def write(
        self, name: str, shape: Sequence[int], dtype: Any, spec: pl.BlockSpec, *, over: str | None = None
    ) -> None:
        """Have the kernel return an array, in the memory of the operand `over` if that is named."""
        if over is not None:
            self.aliases[list(self.operands).index(over)] = len(self.results)
        self.results[name] = jax.ShapeDtypeStruct(tuple(shape), dtype), spec

    def hold(self, name: str, shape: Sequence[int], dtype: Any = F32) -> None:
        """Give the kernel scratch memory, which it keeps from one grid step to the next."""
        self.scratch[name] = pltpu.VMEM(tuple(shape), dtype)

    def run(self, kernel: Callable[..., None]) -> dict[str, Array]:
        """Each result by its name."""
        names = [f"{name}_ref" for name in (*self.operands, *self.results, *self.scratch)]
        results = pl.pallas_call(
            lambda *refs: kernel(**dict(zip(names, refs, strict=True))),
            grid=self.grid,
            in_specs=[spec for _, spec in self.operands.values()],
            out_specs=[spec for _, spec in self.results.values()],
            out_shape=[shape for shape, _ in self.results.values()],
            scratch_shapes=list(self.scratch.values()),
            input_output_aliases=self.aliases,
            compiler_params=self.compiler_params,
            interpret=self.interpret,
            name=self.name,
        )(*(x for x, _ in self.operands.values()))
        return dict(zip(self.results, results, strict=True))


@dataclass(frozen=True)
class TimeGrid:
    """A grid whose last axis walks blocks of time, from the first token or from the last."""

    outer: tuple[int, ...]  # the other axes
    length: int  # tokens
    block: int  # tokens a grid step takes
    backwards: bool = False

    @property
    def steps(self) -> int:
        return -(-self.length // self.block)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.outer, self.steps)

    @property
    def padded(self) -> int:
        """The tokens of whole blocks."""
        return self.steps * self.block

    @property
    def ragged(self) -> bool:
        """Whether the last block hangs over the end of the sequence."""
        return self.length != self.padded

    def launch(self, name: str, *, interpret: bool, vmem_limit: int | None = None) -> Launch:
        """A launch on this grid, in order along time and in any order along the other axes."""
        semantics = ("parallel",) * len(self.outer) + ("arbitrary",)
        return Launch(name, self.sizes, semantics, interpret=interpret, vmem_limit=vmem_limit)

    def at(self, step: Any) -> Any:
        """Which block of time grid step `step` visits."""
        return self.steps - 1 - step if self.backwards else step

    # Inside a kernel:

    @property
    def step(self) -> Array:
        """The grid step along time."""
        return pl.program_id(len(self.outer))

    def first_token(self) -> Array:
        """The number of the block's first token."""
        return self.at(self.step) * self.block

    def at_start(self) -> Callable[[Callable[[], None]], None]:
        """Decorate what runs at the first block visited only, such as filling the carried state."""
        return pl.when(self.step == 0)

    def at_end(self) -> Callable[[Callable[[], None]], None]:
        """Decorate what runs at the last block visited only, such as writing the carried state out."""
        return pl.when(self.step == self.steps - 1)

    def each_tile(
        self,
        tokens: int,
        visit: Callable[[Any, Any], Any],
        carry: Any = 0,
        *,
        backwards: bool | None = None,
    ) -> Any:
        """Thread `carry = visit(first, carry)` through the block's tiles of some tokens, in the grid's order.

        `first` is where the tile begins in the block; `backwards` another order than the grid's.
        """
        count = self.block // tokens
        reverse = self.backwards if backwards is None else backwards

        def step(i: Any, carry: Any) -> Any:
            tile = count - 1 - i if reverse else i
            return visit(tile if tokens == 1 else pl.multiple_of(tile * tokens, tokens), carry)

        return jax.lax.fori_loop(0, count, step, carry)
