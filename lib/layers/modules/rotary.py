"""Rotary position embedding, and the positions it takes: counted within each document, across calls."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...kernels.common.arguments import accumulator
from ...kernels.common.documents import documents


def positions(
    offset: Int[Array, "b"] | None, segment_ids: Int[Array, "b t"] | None, shape: tuple[int, int]
) -> tuple[Int[Array, "b t"], Int[Array, "b"]]:
    """Each token's place in its own document, from 0.

    Args:
      offset: how many tokens of the first token's document came before; None means 0.
      segment_ids: the document of each token; None means one document a row.
      shape: (B, T).

    Returns:
      positions [B, T] int32, and how many tokens of the last token's document there are by now [B].

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
    place = before[:, None] + jnp.arange(T, dtype=jnp.int32) if packed is None else packed.reach(before)
    return place, place[:, -1] + 1


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
    frequency = base ** (-jnp.arange(0, D, 2, dtype=dtype) / D)
    angle = positions[:, :, None, None].astype(dtype) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)
