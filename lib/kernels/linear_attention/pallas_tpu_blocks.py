"""How arrays [B, T, heads, D] reach a TPU kernel, a head's tokens at a time, and uncopied where they can."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .tiling import LANES, Tiling, round_up


@dataclass(frozen=True)
class Cut:
    """The blocks of one [B, T, heads, D] array.

    Eight heads of 128 lanes fill whole tiles, so such an array is read as it lies in memory ("time major"),
    and its heads are told apart in VMEM. XLA transposes and pads any other one to [B, heads, T', D'] first.
    """

    shape: tuple[int, int, int, int]
    dtype: jnp.dtype
    heads: int  # heads of the call, H
    tiling: Tiling
    interpret: bool

    @property
    def group(self) -> int:
        """How many of the call's heads read one of this array's."""
        return self.heads // self.shape[2]

    @property
    def time_major(self) -> bool:
        return self.group == 1 and self.tiling.heads == 8 and self.shape[3] == LANES

    @property
    def steps(self) -> int:
        """Grid steps along time."""
        return -(-self.shape[1] // self.tiling.block)

    @property
    def ragged(self) -> bool:
        """Whether the last block hangs over the end of the array."""
        return self.time_major and self.shape[1] % self.tiling.block != 0

    @property
    def width(self) -> int:
        return round_up(self.shape[3], LANES)

    @property
    def arranged(self) -> jax.ShapeDtypeStruct:
        """What `arrange` gives, and `restore` takes."""
        B, _, heads, _ = self.shape
        padded = (B, heads, self.steps * self.tiling.block, self.width)
        return jax.ShapeDtypeStruct(self.shape if self.time_major else padded, self.dtype)

    def arrange(self, x: Array) -> Array:
        if self.time_major:
            return x
        x = jnp.swapaxes(x, 1, 2)
        return jnp.pad(x, [(0, to - at) for at, to in zip(x.shape, self.arranged.shape, strict=True)])

    def restore(self, x: Array) -> Array:
        if self.time_major:
            return x
        return jnp.swapaxes(x[:, :, : self.shape[1], : self.shape[3]], 1, 2)

    def spec(self, time: Callable[[Array], Array]) -> pl.BlockSpec:
        """The block of grid step (batch, heads, t), where `time(t)` is the block's place along time."""
        n, block = self.tiling.heads, self.tiling.block
        if self.time_major:
            return pl.BlockSpec((1, block, n, self.width), lambda b, h, t: (b, time(t), h, 0))
        if self.group <= n:
            return pl.BlockSpec((1, n // self.group, block, self.width), lambda b, h, t: (b, h, time(t), 0))
        steps = self.group // n  # grid steps that read the same head

        def index(b, h, t):  # `h // steps` would not do: its lowering asks for the chip, where there is none
            return b, jax.lax.div(h, jnp.int32(steps)), time(t), 0

        return pl.BlockSpec((1, 1, block, self.width), index)

    def load(self, ref, head: int, start, first) -> Array:
        """Tokens [chunk, D'] of one head: from `start` in the block, whose own first token is `first`."""
        C = self.tiling.chunk
        if not self.time_major:
            return ref[0, head // self.group if self.group <= self.tiling.heads else 0, pl.ds(start, C), :]
        left = self.shape[1] - first - start  # tokens before the end of the array, which garbage follows
        if self.dtype == jnp.float32:
            if self.interpret:
                rows = ref[0, pl.ds(start, C), head, :]
            else:
                rows = ref.at[0, pl.ds(start, C)].reshape(C * 8, self.width)[pl.ds(head, C, stride=8)]
            return jnp.where(_iota(rows, 0) < left, rows, 0) if self.ragged else rows
        # Two bfloat16 heads share each 32-bit word: take words of even and of odd tokens, and pair their
        # halves.
        even = _read_words(ref, self.interpret, start, C, head // 2, 8)
        odd = _read_words(ref, self.interpret, start, C, head // 2 + 4, 8)
        if self.ragged:
            even = jnp.where(2 * _iota(even, 0) < left, even, 0)
            odd = jnp.where(2 * _iota(odd, 0) + 1 < left, odd, 0)
        if head % 2 == 0:
            return _from_words((even & 0xFFFF) | (odd << 16))
        return _from_words(jax.lax.shift_right_logical(even, 16) | (odd & jnp.int32(-65536)))

    def store(self, ref, head: int, start, tokens: list[Array]) -> None:
        """Write float32 tokens [chunk, D'] of consecutive heads, from `start` in the block."""
        C = self.tiling.chunk
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


def _iota(like: Array, axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, like.shape, axis)


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
