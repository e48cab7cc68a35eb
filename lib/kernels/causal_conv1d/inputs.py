"""The checked call of `causal_conv1d` is, once checked: the form that every backend takes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..common.arguments import known, reject
from ..common.documents import documents
from ..common.rows import window_at, within_reach


class Inputs(NamedTuple):
    """Checked arguments. Tap w reads the input W-1-w tokens back, if that is within `reach`."""

    x: Array  # [B, T, D]
    weight: Array  # [W, D]
    bias: Array | None  # None | [D]
    initial_state: Array | None  # None | [B, W-1, D], in x's dtype
    reach: Array | None  # None (all W-1) | int32 [B, T]: how far back the document goes

    @property
    def width(self) -> int:
        return self.weight.shape[0]


def with_history(call: Inputs) -> Array:
    """x after the W-1 inputs that came before it: [B, W-1+T, D]."""
    B, _, D = call.x.shape
    before = call.initial_state
    if before is None:
        before = jnp.zeros((B, call.width - 1, D), call.x.dtype)
    return jnp.concatenate([before, call.x], axis=1)


def final_state(call: Inputs) -> Array:
    """The state after the last token [B, W-1, D]: that of `states_at`, without a gather or a copy of x."""
    T, W = call.x.shape[1], call.width
    last = call.x[:, T - W + 1 :] if known(T) and T >= W - 1 else with_history(call)[:, T:]
    return last if call.reach is None else within_reach(last, call.reach[:, -1])


def states_at(call: Inputs, places: Array) -> Array:
    """The states after the tokens `places` [B, N]: the last W-1 inputs of their documents [B, N, W-1, D].

    Place -1 is before the first token. Zeros stand for inputs of other documents.
    """
    return window_at(with_history(call), call.width - 1, call.reach, places)


def check(x, weight, bias, initial_state, segment_ids) -> Inputs:
    """Raise ValueError naming the argument that can't be right, or return the checked `Inputs`."""
    for name, a in dict(x=x, weight=weight, bias=bias, initial_state=initial_state).items():
        if a is not None and not jnp.issubdtype(a.dtype, jnp.floating):
            reject(name, a, "a floating dtype")
    if x.ndim != 3 or 0 in x.shape:
        reject("x", x, "[batch, time, channels], every size >= 1")
    B, T, D = x.shape
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != D:
        reject("weight", weight, f"[W, {D}] with W >= 1")
    W = weight.shape[0]
    if bias is not None and bias.shape != (D,):
        reject("bias", bias, f"[{D}]")
    if initial_state is not None:
        if initial_state.shape != (B, W - 1, D):
            reject("initial_state", initial_state, f"[{B}, {W - 1}, {D}]")
        initial_state = initial_state.astype(x.dtype)
    packed = documents(segment_ids, B, T)
    reach = None if packed is None else jnp.minimum(packed.reach(before=W - 1), W - 1)
    return Inputs(x, weight, bias, initial_state, reach)


def check_activation(activation: str | None) -> str | None:
    """None or "silu"; "swish" is its other name."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: got {activation!r}; expected None, 'silu' or 'swish'")
    return activation and "silu"
