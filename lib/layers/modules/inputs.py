"""Checks of what layers are called with, and the axes of parameters beside it."""

import jax.numpy as jnp
from jax import Array

from ...kernels.common.documents import check_segment_ids


def check_input(x: Array, segment_ids: Array | None) -> None:
    """Raise ValueError unless x is floating [B, T, D] and segment_ids None or integers [B, T]."""
    if x.ndim != 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected floating [batch, time >= 1, width]")
    check_segment_ids(segment_ids, x.shape[:2])


def beside(p: Array, x: Array) -> Array:
    """A parameter over x's last axes with as many axes as x: JAX may be told not to add them by itself."""
    return p.reshape(*[1] * (x.ndim - p.ndim), *p.shape)
