"""The checked call of `linear_attention`: the form that every backend takes."""

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import Array

from ..common.arguments import reject
from ..common.documents import documents
from ..common.rows import Rows

FeatureMap = Literal["taylor"]


class Inputs(NamedTuple):
    """Checked arguments. H = max(Hq, Hk, Hv), and each of them divides H: head h reads q's h // (H // Hq)."""

    q: Array  # [B, T, Hq, K]
    k: Array  # [B, T, Hk, K]
    v: Array  # [B, T, Hv, V]
    log_decay: Array | None  # None | [H] | [B, T, H] | [B, T, H, K]
    bonus: Array | None  # None | [H, K]
    initial_state: Array | None  # None | [B, H, K, V]
    runs: Array | None  # None | int32 [B, T]: how many segment boundaries lie in 1..t, so 0 at t = 0

    @property
    def heads(self) -> int:
        return max(self.q.shape[2], self.k.shape[2], self.v.shape[2])


def feature_count(width: int, feature_map: str | None) -> int:
    """The number of features of `width` channels of q or k: the rows of a state."""
    return width if feature_map is None else 1 + width + width * (width + 1) // 2


def repeat_heads(x: Array, heads: int, axis: int = 2) -> Array:
    """Give every one of `heads` heads its own copy of the head it reads."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis)


def check(q, k, v, log_decay, bonus, initial_state, segment_ids, *, feature_map=None) -> Inputs:
    """Raise ValueError naming the argument that can't be right, or return the checked `Inputs`."""
    if feature_map not in (None, *get_args(FeatureMap)):
        raise ValueError(f"feature_map: got {feature_map!r}; expected 'taylor' or None")
    floats = dict(q=q, k=k, v=v, log_decay=log_decay, bonus=bonus, initial_state=initial_state)
    for name, x in floats.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            reject(name, x, "a floating dtype")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            reject(name, x, f"[batch, time, heads, {'V' if name == 'v' else 'K'}]")
        if 0 in x.shape:
            reject(name, x, "every size >= 1")
        if x.dtype != q.dtype:
            reject(name, x, f"q's dtype {q.dtype}")
    B, T, _, K = q.shape
    V = v.shape[3]
    H = max(x.shape[2] for x in (q, k, v))
    if k.shape[:2] != (B, T) or k.shape[3] != K:
        reject("k", k, f"[{B}, {T}, heads, {K}] (q's batch, time and K)")
    if v.shape[:2] != (B, T):
        reject("v", v, f"[{B}, {T}, heads, V] (q's batch and time)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if H % x.shape[2]:
            reject(name, x, f"a number of heads that divides {H}")
    if log_decay is not None:
        h_axis = {1: 0, 3: 2, 4: 2}.get(log_decay.ndim)
        fits = f"None, [{H}], [{B}, {T}, {H}] or [{B}, {T}, {H}, {K}]"
        if h_axis is None or log_decay.shape[h_axis] == 0 or H % log_decay.shape[h_axis]:
            reject("log_decay", log_decay, fits)
        if log_decay.shape[:h_axis] != (B, T)[:h_axis] or log_decay.shape[h_axis + 1 :] not in ((), (K,)):
            reject("log_decay", log_decay, fits)
        log_decay = repeat_heads(log_decay, H, h_axis)
    if feature_map is not None:
        if bonus is not None:
            reject("bonus", bonus, "None with a feature_map")
        if log_decay is not None and log_decay.ndim == 4:
            reject("log_decay", log_decay, f"None, [{H}] or [{B}, {T}, {H}] with a feature_map")
        K = feature_count(K, feature_map)
    if bonus is not None and bonus.shape != (H, K):
        reject("bonus", bonus, f"[{H}, {K}]")
    if initial_state is not None and initial_state.shape != (B, H, K, V):
        reject("initial_state", initial_state, f"[{B}, {H}, {K}, {V}]")
    packed = documents(segment_ids, B, T)
    runs = None if packed is None else packed.index
    return Inputs(q, k, v, log_decay, bonus, initial_state, runs)


def in_reading_order(call: Inputs, read: Rows) -> Inputs:
    """The call as its rows are read: tokens past a row's end leave the state as it is."""
    B, T = read.shape
    g = call.log_decay
    if g is not None and g.ndim == 1 and read.lengths is not None:
        g = jnp.broadcast_to(g, (B, T, *g.shape))
    packed = documents(read.ids, B, T)
    return call._replace(
        q=read.read(call.q),
        k=read.read(call.k),
        v=read.read(call.v),
        log_decay=g if g is None or g.ndim == 1 else read.read(g),
        runs=None if packed is None else packed.index,
    )
