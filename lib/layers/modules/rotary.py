"""Rotary position embedding, and the positions it takes: counted within each document, across calls."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ...kernels.common.arguments import accumulator
from ...kernels.common.documents import documents
from ...kernels.common.rows import RowArguments, last_output


def positions(
    offset: Int[Array, "b"] | None,
    segment_ids: Int[Array, "b t"] | None,
    shape: tuple[int, int],
    *,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
) -> tuple[Int[Array, "b t"], Int[Array, "b *n"]]:
    """Each token's place in its own document, from 0.

    Args:
      offset: how many tokens of the first token's document came before; None means 0.
      segment_ids: the document of each token; None means one document a row.
      shape: (B, T).
      lengths, segment_states: as in `Mixer`.

    Returns:
      positions [B, T] int32, and how many tokens of the last token's document there are by now [B]; with
      `segment_states` of each document [B, N].

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax.layers import positions
        >>> place, offset = positions(jnp.array([7]), jnp.array([[3, 3, 5, 5, 5]]), (1, 5))
        >>> place.tolist(), offset.tolist()
        ([[7, 8, 0, 1, 2]], [3])
    """
    B, T = shape
    before = jnp.zeros(B, jnp.int32) if offset is None else offset.astype(jnp.int32)
    packed = documents(segment_ids, B, T)
    place = before[:, None] + jnp.arange(T, dtype=jnp.int32)[None] if packed is None else packed.reach(before)
    rows = RowArguments(segment_ids=segment_ids, lengths=lengths, segment_states=segment_states)
    return place, last_output(place + 1, before, **rows)


def rotary(
    x: Float[Array, "b t h d"], positions: Int[Array, "b t"], *, base: int | float = 10000.0
) -> Float[Array, "b t h d"]:
    """Turn channel pairs (i, i + D/2) of each head by position * base^(-2i/D) radians.

    Args:
      x: queries or keys; D is even.
      positions: each token's place.
      base: the slowest pair turns once in about 2 pi * base tokens.

    Returns:
      The turned x: the inner product of two of them depends on their positions' difference only.

    Raises:
      ValueError: D is odd.

    Source: RoFormer, Su et al. 2021 (arXiv 2104.09864).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> frugax.layers.rotary(x, jnp.array([[1]])).ravel().round(3).tolist()  # cos 1, sin 1
        [0.5400000214576721, 0.8410000205039978]
    """
    D = x.shape[-1]
    if D % 2:
        raise ValueError(f"x: got heads of {D} channels; expected an even number")
    dtype = accumulator(x.dtype)
    frequency = float(base) ** (-np.arange(0, D, 2) / D)
    angle = angles(positions[:, :, None, None], frequency[None, None, None], dtype)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def angles(
    positions: Int[Array, "..."], frequency: np.ndarray | Array, dtype: DTypeLike
) -> Float[Array, "..."]:
    """positions * frequency radians up to whole turns, exact to `dtype` at any int32 position.

    A float32 product is off by radians at positions of millions. Here turns are counted in integers, which
    wrap around as turns do, so that two positions' angles differ as the positions do, wherever they are.

    Args:
      positions: integers, that broadcast with the frequency.
      frequency: radians a position, a numpy array or one to differentiate in.
      dtype: float32 or float64, of the result.
    """
    if dtype == jnp.float64:
        return positions.astype(dtype) * jnp.asarray(frequency, dtype)
    places = positions.astype(jnp.uint32)
    high, low = _turns(frequency)
    # The upper 32 of 48 fractional bits of places * turns: sums modulo 2^32 leave whole turns out.
    phase = places * high + (places >> 16) * low + (((places & 0xFFFF) * low) >> 16)
    angle = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(dtype) * (2 * np.pi * 2.0**-32)
    if isinstance(frequency, np.ndarray):
        return angle
    return angle + positions.astype(dtype) * (frequency - jax.lax.stop_gradient(frequency)).astype(dtype)


def _turns(frequency: np.ndarray | Array) -> tuple[Array, Array]:
    """The fraction of frequency / 2 pi as two integers: the first 32 bits behind the point, and 16 more."""
    if isinstance(frequency, np.ndarray):
        bits = np.floor(frequency / (2 * np.pi) % 1 * 2.0**48).astype(np.uint64)
        return jnp.asarray((bits >> 16).astype(np.uint32)), jnp.asarray((bits % 2**16).astype(np.uint32))
    turns = jax.lax.stop_gradient(frequency).astype(jnp.float32) / (2 * np.pi)
    turns = (turns - jnp.floor(turns)) * 2.0**32
    high = jnp.floor(turns)
    return high.astype(jnp.uint32), jnp.floor((turns - high) * 2.0**16).astype(jnp.uint32)
