"""Checks of what layers are called with: sequences and the ids of their documents."""

import jax.numpy as jnp
from jax import Array

from ...kernels.common.documents import check_segment_ids


def check_input(x: Array, segment_ids: Array | None) -> None:
    """Raise ValueError unless x is floating [B, T, D] and segment_ids None or integers [B, T]."""
    if x.ndim != 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected floating [batch, time >= 1, width]")
    check_segment_ids(segment_ids, x.shape[:2])
