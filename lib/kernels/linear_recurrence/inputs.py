"""The checked call of `linear_recurrence` is, once checked: the form that every backend takes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator, reject
from ..common.documents import documents


class Inputs(NamedTuple):
    """Checked arguments: a is zero where a document starts: given `starts`, a zero forgets NaN too."""

    a: Array  # [B, T, D]
    b: Array  # [B, T, D]
    initial_state: Array  # [B, D], in the accumulator's dtype
    starts: Array | None  # None | int32 [B, T]: 1 for the first token read of a document, but 0 for the row's


def check(a, b, initial_state, segment_ids, reverse: bool) -> Inputs:
    """Raise ValueError naming the argument that can't be right, or return the checked `Inputs`."""
    for name, x in dict(a=a, b=b, initial_state=initial_state).items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            reject(name, x, "a floating dtype")
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 3:
            reject(name, x, "[batch, time, D]")
        if 0 in x.shape:
            reject(name, x, "every size >= 1")
    if b.shape != a.shape:
        reject("b", b, f"a's shape {list(a.shape)}")
    B, T, D = a.shape
    if initial_state is not None and initial_state.shape != (B, D):
        reject("initial_state", initial_state, f"[{B}, {D}]")
    dtype = accumulator(a.dtype, b.dtype)
    h0 = jnp.zeros((B, D), dtype) if initial_state is None else initial_state.astype(dtype)
    packed = documents(segment_ids, B, T)
    if packed is None:
        return Inputs(a, b, h0, None)
    starts = packed.ends if reverse else packed.starts
    return Inputs(jnp.where(starts[:, :, None], jnp.zeros_like(a), a), b, h0, starts.astype(jnp.int32))
