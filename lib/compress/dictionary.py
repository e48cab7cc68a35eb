"""Ternary matrices below one bit a weight, without loss: QMoE's codewords of a fixed dictionary."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from ..formats import MinMax, QuantizedTensor
from .words import LONGEST, dictionary, encode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedTernary:
    """A ternary matrix [K, N] as codewords of 16 bits, or a stack of such matrices.

    The weights of each output, a column, are a row of codewords: a run of up to 28 weights each. Rows begin
    where the offsets say, so that any may be decoded alone.

    Attributes:
      codes: uint16 [..., n], the codewords of all rows; of a stack, as many as its longest matrix has.
      offsets: int32 [..., N + 1], where rows begin.
      low, high: floats [..., N], the values of each column below and above zero.
      inputs: K.
      longest: codewords of the longest row, rounded up.

    Example:
        >>> import frugax, jax
        >>> w = jax.random.normal(jax.random.key(0), (512, 256))
        >>> q = frugax.formats.quantize(w, "ternary_minmax")
        >>> packed = frugax.compress.compress_ternary(q)
        >>> packed.shape, round(packed.bits_per_weight, 2)
        ((512, 256), 0.96)
        >>> bool((packed.decode() == q.dequantize()).all())
        True
    """

    codes: Any
    offsets: Any
    low: Any
    high: Any
    inputs: int = dataclasses.field(metadata=dict(static=True))
    longest: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, or of the stack."""
        return (*self.low.shape[:-1], self.inputs, self.low.shape[-1])

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.low.ndim + 1

    @property
    def nbytes(self) -> int:
        """Bytes of codewords, offsets and values; the dictionary's 512 KiB are the program's."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all that is stored, over the number of weights."""
        return 8 * self.nbytes / math.prod(self.shape)

    def decode(self, dtype: DTypeLike = jnp.float32) -> Array:
        """The matrices that were compressed, [..., K, N]."""
        whole = lambda w: decode_rows(w, jnp.arange(w.low.shape[-1], dtype=jnp.int32), dtype)  # noqa: E731
        for _ in range(self.ndim - 2):
            whole = jax.vmap(whole)
        return jnp.swapaxes(whole(self), -1, -2)


def compress_ternary(q: QuantizedTensor) -> CompressedTernary:
    """Compress a ternary matrix by a fixed dictionary, greedily; offline, on the host.

    The dictionary is made for weights of which 88.5 % are zero, as those of "ternary_minmax" in large groups
    are: they take about 0.8 bits. Weights with fewer zeros take more, up to 8.

    Args:
      q: [..., K, N] in "ternary_minmax" or "ternary", with one group for each column. Matrices are compressed
        one by one.

    Raises:
      ValueError: q is in another format, in several groups, in groups along another axis, or not finite.

    Source: Frantar & Alistarh 2023, QMoE (arXiv 2310.16795), section 4. Codewords are numbered otherwise than
    the authors', so that their files are not read.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> q = frugax.formats.quantize(jnp.eye(64, 3), "ternary_minmax")
        >>> frugax.compress.compress_ternary(q).offsets.tolist()
        [0, 3, 6, 9]
    """
    _check(q)
    trits, low, high, finite = _parts(q)
    if not finite:
        raise ValueError("q: got values that are not finite; expected numbers alone")
    *stack, N, K = trits.shape
    encoded = [encode(matrix) for matrix in np.asarray(trits).reshape(-1, N, K)]
    n = max(len(codes) for codes, _ in encoded)
    codes = np.stack([np.pad(codes, (0, n - len(codes))) for codes, _ in encoded]).reshape(*stack, n)
    offsets = np.stack([offsets for _, offsets in encoded]).reshape(*stack, N + 1)
    longest = -(-int(np.diff(offsets).max()) // 8) * 8  # so that matrices of a shape share their program
    return CompressedTernary(jnp.asarray(codes), jnp.asarray(offsets), low, high, K, longest)


def _check(q: QuantizedTensor) -> None:
    if not isinstance(q, QuantizedTensor) or q.format.name not in ("ternary_minmax", "ternary"):
        got = q.format.name if isinstance(q, QuantizedTensor) else type(q).__name__
        raise ValueError(f"q: got {got}; expected a QuantizedTensor in ternary_minmax or ternary")
    if q.ndim < 2 or q.axis != -2 or q.group_size < q.shape[-2]:
        got = f"{list(q.shape)} in groups of {q.group_size} along axis {q.axis}"
        raise ValueError(f"q: got {got}; expected [..., K, N] in one group along axis -2")


@jax.jit
def _parts(q: QuantizedTensor) -> tuple[Array, Array, Array, Array]:
    """Trits int8 [..., N, K], the values of each column below and above zero, and if those are finite."""
    codes = q.unpacked()
    if isinstance(q.format.scheme, MinMax):
        low, high = (end[..., 0].astype(jnp.bfloat16) for end in q.format.scheme.ends(q.scaling()))
    else:
        high = jnp.broadcast_to(q.scales[..., 0, :], codes.shape[:-1])
        low = -high
    finite = jnp.isfinite(low).all() & jnp.isfinite(high).all()
    return jnp.where(codes < 0, 2, codes).astype(jnp.int8), low, high, finite


def decode_rows(w: CompressedTernary, rows: Int[Array, "R"], dtype: DTypeLike) -> Float[Array, "R K"]:
    """Decode rows of codewords of one matrix, columns of it; a row past the last is zero.

    Where its codewords' runs begin is the sum of the lengths before; each pair of weights then looks up its
    codeword, all at once.
    """
    P = -(-w.inputs // 2)
    N = w.low.shape[-1]
    begin, end = w.offsets[jnp.minimum(rows, N)], w.offsets[jnp.minimum(rows + 1, N)]
    at = begin[:, None] + jnp.arange(w.longest, dtype=jnp.int32)[None]
    real = at < end[:, None]
    code = w.codes.at[at].get(mode="clip").astype(jnp.int32)
    words = jnp.asarray(dictionary().words)[code]  # [R, longest, 2]
    length = jnp.where(real, (words[..., 0] >> 28).astype(jnp.int32), 0)
    first = jnp.cumsum(length, 1, dtype=jnp.int32) - length

    each = jnp.arange(len(rows), dtype=jnp.int32)[:, None]
    begins = jnp.zeros((len(rows), P), jnp.int32).at[each, first].add(real.astype(jnp.int32), mode="drop")
    mine = jnp.maximum(jnp.cumsum(begins, 1, dtype=jnp.int32) - 1, 0)  # the codeword of each pair
    place = jnp.arange(P, dtype=jnp.int32)[None] - jnp.take_along_axis(first, mine, 1)
    word = jnp.where(place < LONGEST // 2, words[each, mine, 0], words[each, mine, 1])
    pair = word >> (4 * (place % (LONGEST // 2))).astype(jnp.uint32)
    trits = jnp.stack([pair & 3, (pair >> 2) & 3], -1).reshape(len(rows), -1)[:, : w.inputs]
    low, high = (end[jnp.minimum(rows, N - 1)][:, None].astype(dtype) for end in (w.low, w.high))
    known = (end > begin)[:, None]
    values = jnp.where(trits == 1, high, jnp.where(trits == 2, low, jnp.zeros_like(low)))
    return jnp.where(known, values, jnp.zeros_like(values))
