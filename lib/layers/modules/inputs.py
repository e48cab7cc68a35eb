"""Checks of what layers are called with: sequences and the ids of their documents."""

import jax.numpy as jnp
from jax import Array


def check_input(x: Array, segment_ids: Array | None) -> None:
    """Raise ValueError unless x is floating [B, T, D] and segment_ids None or integers [B, T]."""
    if x.ndim != 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected floating [batch, time >= 1, width]")
    check_segment_ids(segment_ids, x.shape[:2])


def check_segment_ids(segment_ids: Array | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless segment_ids is None or integers of `shape`."""
    if segment_ids is None:
        return
    if segment_ids.shape != shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        got = f"{segment_ids.dtype}{list(segment_ids.shape)}"
        raise ValueError(f"segment_ids: got {got}; expected integers {list(shape)}")
