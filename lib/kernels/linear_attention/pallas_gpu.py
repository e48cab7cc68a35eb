"""Linear attention on Hopper, in Mosaic GPU kernels: what they can serve, and how the passes fit together.

Two passes each way. One walks the chunks of 64 tokens and writes the state at each chunk's edge; the other
has every chunk's own work, all chunks at once. The backward pass walks the states' gradients from the end,
gets d_v as the outputs of the reversed sequence, and the other gradients chunk by chunk. It keeps only the
inputs.
"""

import jax.numpy as jnp
from jax import Array

from ..common import compat
from . import pallas_gpu_features as features
from .inputs import Inputs, repeat_heads
from .pallas_gpu_arrays import Rows, pad_axes, rows_of, sum_heads
from .pallas_gpu_backward import gradients
from .pallas_gpu_forward import outputs, states
from .pallas_gpu_fused import walk
from .tiling_gpu import Tiling, choose

_MOST_BLOCKS = 65535  # in the y and z dimensions of a CUDA grid


def unsupported_reason(call: Inputs, feature_map: str | None = None) -> str | None:
    """Why these kernels can't serve the call; None if they can. Works on shapes and dtypes alone."""
    B, _, _, K = call.q.shape
    V = call.v.shape[-1]
    if call.q.dtype != jnp.bfloat16:
        return f"q, k and v must be bfloat16; they are {call.q.dtype}"
    if feature_map is not None:
        reason = features.unsupported_reason(call, feature_map)
        if reason is not None:
            return reason
    elif min(K, V) < 32:
        return f"K and V must be at least 32 (they are padded to multiples of 64); they are {K} and {V}"
    if max(B, call.heads) > _MOST_BLOCKS:
        return f"batch and heads must be at most {_MOST_BLOCKS}; they are {B} and {call.heads}"
    return compat.local_gpu_lacks_mosaic()


def forward(
    call: Inputs, scale: float, feature_map: str | None = None, *, interpret: bool
) -> tuple[Array, Array]:
    """The outputs [B, T, H, V] and the final state [B, H, F, V], as `reference.forward` defines them."""
    if feature_map is not None:
        return features.forward(call, scale, feature_map, interpret=interpret)
    T, K, V = _sizes(call)
    padded = _pad(call)
    rows = rows_of(call)
    tiling = _tiling(padded)
    if tiling.fused:
        weights = [rows.query * scale, rows.sum_as_query, rows.sum_as_key, rows.run, rows.key, rows.keep]
        out, last, _ = walk(
            padded.q,
            padded.k,
            padded.v,
            jnp.stack(weights, 3),
            padded.initial_state,
            scale,
            heads=call.heads,
            reverse=False,
            packed=call.runs is not None,
            interpret=interpret,
        )
        return out[:, :T, :, :V], last[:, :, :K, :V]
    before, last = _states(padded, rows, tiling, interpret)
    out = outputs(
        padded.q,
        padded.k,
        padded.v,
        _per_channel(padded),
        padded.bonus,
        jnp.stack([rows.query * scale, rows.sum_as_query, rows.sum_as_key, rows.run], 3),
        before,
        scale,
        reverse=False,
        packed=call.runs is not None,
        tiling=tiling,
        interpret=interpret,
    )
    return out[:, :T, :, :V], last[:, :, :K, :V]


def backward(
    call: Inputs,
    cotangents: tuple[Array, Array],
    scale: float,
    feature_map: str | None = None,
    *,
    interpret: bool,
) -> Inputs:
    """The gradient of every float input, in its shape and dtype."""
    if feature_map is not None:
        return features.backward(call, cotangents, scale, feature_map, interpret=interpret)
    T, K, V = _sizes(call)
    padded = _pad(call)
    q, k, v = padded.q, padded.k, padded.v
    rows = rows_of(call)
    tiling = _tiling(padded)
    log_decay, packed = _per_channel(padded), call.runs is not None
    d_out = pad_axes(cotangents[0], q.shape[1], v.shape[-1])
    d_final = pad_axes(cotangents[1], q.shape[-1], v.shape[-1], axes=(2, 3))

    before, _ = _states(padded, rows, tiling, interpret)
    d_v, d_initial, d_after = _walk_back(padded, rows, tiling, d_out, d_final, scale, interpret)
    weights = [rows.query * scale, rows.key, rows.keep, rows.sum_as_query, rows.sum_as_key, rows.run]
    d_q, d_k, d_decay = gradients(
        q,
        k,
        v,
        d_out,
        log_decay,
        padded.bonus,
        jnp.stack(weights, 3),
        before,
        d_after,
        scale,
        packed=packed,
        interpret=interpret,
    )
    if call.log_decay is None:
        d_log_decay = None
    elif log_decay is not None:
        d_log_decay = d_decay[:, :T, :, :K].astype(call.log_decay.dtype)
    else:
        d_log_decay = _sum_decay_parts(d_decay, call.bonus is not None)[:, :T]
        d_log_decay = d_log_decay.sum((0, 1)) if call.log_decay.ndim == 1 else d_log_decay
        d_log_decay = d_log_decay.astype(call.log_decay.dtype)
    return Inputs(
        sum_heads(d_q[:, :T, :, :K], call.q),
        sum_heads(d_k[:, :T, :, :K], call.k),
        sum_heads(d_v[:, :T, :, :V], call.v),
        d_log_decay,
        None if call.bonus is None else _d_bonus(call, cotangents[0], scale),
        None if call.initial_state is None else d_initial[:, :, :K, :V].astype(call.initial_state.dtype),
        None,
    )


def _sizes(call: Inputs) -> tuple[int, int, int]:
    return call.q.shape[1], call.q.shape[3], call.v.shape[3]


def _tiling(padded: Inputs) -> Tiling:
    B, K, V = padded.q.shape[0], padded.q.shape[-1], padded.v.shape[-1]
    return choose(B, padded.heads, K, V, _per_channel(padded) is not None, padded.bonus is not None)


def _per_channel(padded: Inputs) -> Array | None:
    return padded.log_decay if padded.log_decay is not None and padded.log_decay.ndim == 4 else None


def _states(padded: Inputs, rows: Rows, tiling: Tiling, interpret: bool) -> tuple[Array, Array]:
    return states(
        padded.k,
        padded.v,
        _per_channel(padded),
        jnp.stack([rows.key, rows.keep], 3),
        padded.initial_state,
        reverse=False,
        exclusive=False,
        heads=padded.heads,
        tiling=tiling,
        interpret=interpret,
    )


def _walk_back(
    padded: Inputs, rows: Rows, tiling: Tiling, d_out: Array, d_final: Array, scale: float, interpret: bool
) -> tuple[Array, Array, Array]:
    """d_v, d_initial_state, and the gradient of the state after each chunk."""
    q, k, log_decay, packed = padded.q, padded.k, _per_channel(padded), padded.runs is not None
    if tiling.fused:
        weights = [rows.key, rows.sum_as_query, rows.sum_as_key, rows.run, rows.query * scale, rows.keep]
        return walk(
            k,
            q,
            d_out,
            jnp.stack(weights, 3),
            d_final,
            scale,
            heads=padded.heads,
            reverse=True,
            packed=packed,
            interpret=interpret,
        )
    d_after, d_initial = states(
        q,
        d_out,
        log_decay,
        jnp.stack([rows.query * scale, rows.keep], 3),
        d_final,
        reverse=True,
        exclusive=padded.bonus is not None,
        heads=padded.heads,
        tiling=tiling,
        interpret=interpret,
    )
    d_v = outputs(
        k,
        q,
        d_out,
        log_decay,
        padded.bonus,
        jnp.stack([rows.key, rows.sum_as_query, rows.sum_as_key, rows.run], 3),
        d_after,
        scale,
        reverse=True,
        packed=packed,
        tiling=tiling,
        interpret=interpret,
    )
    return d_v, d_initial, d_after


def _pad(call: Inputs) -> Inputs:
    """T to whole chunks, K and V to whole blocks. Zero keys add nothing, zero log-decays keep the state."""
    T, K, V = (-(-size // 64) * 64 for size in _sizes(call))
    log_decay, bonus, state = call.log_decay, call.bonus, call.initial_state
    if log_decay is not None and log_decay.ndim == 4:
        kind = jnp.bfloat16 if log_decay.dtype == jnp.bfloat16 else jnp.float32
        log_decay = pad_axes(log_decay.astype(kind), T, K)
    if bonus is not None:
        bonus = pad_axes(bonus.astype(jnp.float32), K, axes=(1,))
    if state is not None:
        state = pad_axes(state.astype(jnp.float32), K, V, axes=(2, 3))
    return Inputs(
        pad_axes(call.q, T, K),
        pad_axes(call.k, T, K),
        pad_axes(call.v, T, V),
        log_decay,
        bonus,
        state,
        call.runs,
    )


def _sum_decay_parts(parts: Array, exclusive: bool) -> Array:
    """The parts from `gradients`, [B, H, T / CHUNK, K / 64, 4, CHUNK], to d_log_decay [B, T, H]."""
    as_query, as_key, beyond, passing = jnp.moveaxis(parts.sum(3), 3, 0)

    def from_here_on(x):
        return jnp.cumsum(x[..., ::-1], -1)[..., ::-1]

    later = from_here_on(as_query + as_key)
    if exclusive:  # a query does not decay by its own token
        later = later - as_query
    earlier = jnp.pad(jnp.cumsum(beyond, -1)[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    d = later + earlier + passing.sum(-1, keepdims=True)
    return d.reshape(*d.shape[:2], -1).swapaxes(1, 2)


def _d_bonus(call: Inputs, d_out: Array, scale: float) -> Array:
    q, k, v = (repeat_heads(x, call.heads).astype(jnp.float32) for x in (call.q, call.k, call.v))
    d_own = scale * (d_out.astype(jnp.float32) * v).sum(-1, keepdims=True)
    return (d_own * q * k).sum((0, 1)).astype(call.bonus.dtype)
