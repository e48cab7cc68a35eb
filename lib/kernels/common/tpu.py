"""The parts of TPU kernels: a launch, the walk over time, the layout of heads, products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .chips import LANES, SUBLANES
from .tiling import round_up

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
      grid: its sizes; the last axis varies fastest. One may be an int32 that is known at run time alone.
      semantics: of each axis of the grid, "parallel" or "arbitrary" (in order).
      vmem_limit: bytes of VMEM that the kernel may hold; None: the compiler's default, 16 MiB on v5e.
      bounds_checks: whether copies between memories test their addresses, in some 20 cycles each.
    """

    def __init__(
        self,
        name: str,
        grid: tuple[int | Array, ...],
        semantics: Sequence[str],
        *,
        interpret: bool,
        vmem_limit: int | None = None,
        bounds_checks: bool = True,
    ):
        self.name, self.grid, self.interpret = name, grid, interpret
        self.compiler_params = pltpu.CompilerParams(
            dimension_semantics=tuple(semantics),
            vmem_limit_bytes=vmem_limit,
            disable_bounds_checks=not bounds_checks,
        )
        self.scalars: dict[str, Array] = {}
        self.operands: dict[str, tuple[Array, pl.BlockSpec]] = {}
        self.results: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}
        self.scratch: dict[str, Any] = {}
        self.aliases: dict[int, int] = {}

    def prefetch(self, name: str, x: Array) -> None:
        """Give the kernel an int32 array in scalar memory; the index of every block gets its ref as well."""
        self.scalars[name] = x

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
        names = [f"{name}_ref" for name in (*self.scalars, *self.operands, *self.results, *self.scratch)]
        # Mosaic has no 64-bit loops or indices, which Python numbers are under jax_enable_x64.
        with jax.enable_x64(False):
            results = pl.pallas_call(
                lambda *refs: kernel(**dict(zip(names, refs, strict=True))),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=len(self.scalars),
                    grid=self.grid,
                    in_specs=[spec for _, spec in self.operands.values()],
                    out_specs=[spec for _, spec in self.results.values()],
                    scratch_shapes=list(self.scratch.values()),
                ),
                out_shape=[shape for shape, _ in self.results.values()],
                input_output_aliases={len(self.scalars) + at: to for at, to in self.aliases.items()},
                compiler_params=self.compiler_params,
                interpret=self.interpret,
                name=self.name,
            )(*self.scalars.values(), *(x for x, _ in self.operands.values()))
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
        """The last block hangs over the end of the sequence."""
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


@dataclass(frozen=True)
class Layout:
    """The blocks of one [B, T, heads, D] array on a grid (batch, groups of heads, time).

    Eight heads of 128 lanes fill whole tiles, so such an array is read as it lies in memory ("time major"),
    and its heads are told apart in VMEM. XLA transposes and pads any other one to [B, heads, T', D'] first.
    """

    shape: tuple[int, int, int, int]
    dtype: Any
    heads: int  # heads of the call, H
    per_step: int  # heads of the call that a grid step works on
    grid: TimeGrid
    chunk: int  # tokens that `load` gives
    interpret: bool

    @property
    def group(self) -> int:
        """The number of the call's heads that read one of this array's."""
        return self.heads // self.shape[2]

    @property
    def time_major(self) -> bool:
        return self.group == 1 and self.per_step == SUBLANES and self.shape[3] == LANES

    @property
    def ragged(self) -> bool:
        """The last block hangs over the end of the array."""
        return self.time_major and self.grid.ragged

    @property
    def width(self) -> int:
        return round_up(self.shape[3], LANES)

    @property
    def arranged(self) -> tuple[int, ...]:
        """The shape that `arrange` gives, and `restore` takes."""
        B, _, heads, _ = self.shape
        return self.shape if self.time_major else (B, heads, self.grid.padded, self.width)

    def arrange(self, x: Array) -> Array:
        if self.time_major:
            return x
        x = jnp.swapaxes(x, 1, 2)
        return jnp.pad(x, [(0, to - at) for at, to in zip(x.shape, self.arranged, strict=True)])

    def restore(self, x: Array) -> Array:
        if self.time_major:
            return x
        return jnp.swapaxes(x[:, :, : self.shape[1], : self.shape[3]], 1, 2)

    @property
    def spec(self) -> pl.BlockSpec:
        """The block of a grid step (batch, heads, time)."""
        n, block, at = self.per_step, self.grid.block, self.grid.at
        if self.time_major:
            return pl.BlockSpec((1, block, n, self.width), lambda b, h, t: (b, at(t), h, 0))
        if self.group <= n:
            return pl.BlockSpec((1, n // self.group, block, self.width), lambda b, h, t: (b, h, at(t), 0))
        steps = self.group // n  # grid steps that read the same head

        def index(b: Any, h: Any, t: Any) -> tuple[Any, ...]:
            # `h // steps` would not do: its lowering asks for the chip, where there is none
            return b, jax.lax.div(h, jnp.int32(steps)), at(t), 0

        return pl.BlockSpec((1, 1, block, self.width), index)

    # Inside a kernel:

    def load(self, ref, head: int, start, first) -> Array:
        """Tokens [chunk, D'] of one head: from `start` in the block, whose own first token is `first`."""
        C = self.chunk
        if not self.time_major:
            return ref[0, head // self.group if self.group <= self.per_step else 0, pl.ds(start, C), :]
        left = self.shape[1] - first - start  # tokens before the end of the array, which garbage follows
        if self.dtype == jnp.float32:
            if self.interpret:
                rows = ref[0, pl.ds(start, C), head, :]
            else:
                rows = ref.at[0, pl.ds(start, C)].reshape(C * 8, self.width)[pl.ds(head, C, stride=8)]
            return jnp.where(iota(rows.shape, 0) < left, rows, 0) if self.ragged else rows
        # Two bfloat16 heads share each 32-bit word: take words of even and of odd tokens, and pair their
        # halves.
        even = _read_words(ref, self.interpret, start, C, head // 2, 8)
        odd = _read_words(ref, self.interpret, start, C, head // 2 + 4, 8)
        if self.ragged:
            even = jnp.where(2 * iota(even.shape, 0) < left, even, 0)
            odd = jnp.where(2 * iota(odd.shape, 0) + 1 < left, odd, 0)
        if head % 2 == 0:
            return _from_words((even & 0xFFFF) | (odd << 16))
        return _from_words(jax.lax.shift_right_logical(even, jnp.int32(16)) | (odd & jnp.int32(-65536)))

    def store(self, ref, head: int, start, tokens: list[Array]) -> None:
        """Write float32 tokens [chunk, D'] of consecutive heads, from `start` in the block."""
        C = self.chunk
        if not self.time_major:
            for n, x in enumerate(tokens):
                ref[0, head + n, pl.ds(start, C), :] = x.astype(self.dtype)
        elif self.interpret:
            for n, x in enumerate(tokens):
                ref[0, pl.ds(start, C), head + n, :] = x.astype(self.dtype)
        elif self.dtype == jnp.float32:
            rows = ref.at[0, pl.ds(start, C)].reshape(C * 8, self.width)
            for n, x in enumerate(tokens):
                rows[pl.ds(head + n, C, stride=8)] = x
        else:
            for n in range(0, len(tokens), 2):
                _write_words(ref, start, C, (head + n) // 2, tokens[n], tokens[n + 1])


def _read_words(ref, interpret: bool, start, chunk: int, offset: int, stride: int) -> Array:
    """Every `stride`-th row, from `offset`, of words: row 4 t + p holds heads 2p and 2p+1 of token t."""
    width = ref.shape[3]
    if not interpret:
        words = ref.at[0, pl.ds(start, chunk)].bitcast(jnp.int32).reshape(chunk * 4, width)
        return words[pl.ds(offset, chunk * 4 // stride, stride=stride)]
    tokens = ref[0, pl.ds(start, chunk)].reshape(chunk * 4, 2, width)
    return jax.lax.bitcast_convert_type(jnp.swapaxes(tokens, 1, 2), jnp.int32)[offset::stride]


def _write_words(ref, start, chunk: int, pair: int, low: Array, high: Array) -> None:
    """Round two heads to bfloat16 and write them as one row of words a token."""
    words = pltpu.pack_elementwise([low, high], packed_dtype=jnp.bfloat16)
    rows = ref.at[0, pl.ds(start, chunk)].bitcast(jnp.int32).reshape(chunk * 4, ref.shape[3])
    rows[pl.ds(pair, chunk, stride=4)] = jax.lax.bitcast_convert_type(words, jnp.int32)


def _from_words(words: Array) -> Array:
    """int32 [n, D] -> bfloat16 [2n, D]: the low half of a word is the earlier token."""
    return pltpu.bitcast(words, jnp.bfloat16)
