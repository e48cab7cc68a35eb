"""Sequence parallelism: the operations of `frugax.kernels` on one shard of time, inside `jax.shard_map`.

Over a stretch of time a linear recurrence is an affine map of the state before it, S_out = decay * S_in + S.
So shards exchange their maps, of a state's size, and no tokens; each applies those of the shards before it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from .. import kernels
from ..kernels.causal_conv1d import inputs as conv
from ..kernels.common.arguments import accumulator
from ..kernels.common.documents import documents
from ..kernels.common.operation import Backend
from ..kernels.common.rows import outputs_at
from ..kernels.common.sharding import vary_like
from ..kernels.linear_attention import inputs as attention
from ..kernels.linear_attention.features import widened
from ..kernels.linear_attention.states import states_at as attention_states_at
from .shards import entering_state, faded, state_after


def linear_attention(
    q: Float[Array, "b t hq k"],
    k: Float[Array, "b t hk k"],
    v: Float[Array, "b t hv v"],
    log_decay: Float[Array, "h"] | Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    *,
    axis_name: str,
    feature_map: attention.FeatureMap | None = None,
    bonus: Float[Array, "h k"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "b h f v"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    places: Int[Array, "b m"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b *places h f v"]]:
    """`frugax.kernels.linear_attention` with time split over the mesh axis `axis_name`.

    Each shard makes the state its tokens leave (one matmul of K x V a token), the shards pass these states
    and total decays on, and the kernel then runs once, from the right initial state. Adding q_t S_in to a
    local output would take as many FLOPs, and one more float32 array of the output's size to read and write.

    Args:
      q, k, v, log_decay, feature_map, bonus, scale, segment_ids, backend: as there; one shard of time of
        those that have it.
      axis_name: a manual mesh axis of the `shard_map` around the call; shards are in the order of time.
      initial_state: the state before the first shard's first token, the same on every shard.
      places: tokens of the whole row [B, M]; the states after them are returned, -1 being the initial state.

    Returns:
      This shard's out [B, T, H, V], and the state after the last shard's last token, or [B, M, ...]
      those after `places`, the same on every shard.

    Raises:
      ValueError: as `frugax.kernels.linear_attention`.

    Source: LASP-2 (arXiv 2502.07563), which exchanges states at once where LASP (2404.02882) has a ring. Its
    all-gather of P states is a scan of log2(P) steps here.

    Example:
        >>> import frugax, jax, functools
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
        >>> q = k = v = jax.numpy.ones((1, 64, 2, 16))
        >>> f = functools.partial(frugax.parallel.linear_attention, axis_name="time")
        >>> split = P(None, "time")
        >>> out, state = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=(split, P())))(q, k, v)
        >>> out.shape
        (1, 64, 2, 16)
    """
    arrays = (q, k, v, log_decay, bonus, initial_state, segment_ids)
    call = attention.check(*arrays, feature_map=feature_map)
    wide = widened(call, feature_map)
    S_BHKV, total_BHK1 = state_left(wide)
    entering = entering_state(total_BHK1, S_BHKV, initial_state, segment_ids, axis_name, logs=True)
    out, final_state = kernels.linear_attention(
        q,
        k,
        v,
        log_decay,
        feature_map=feature_map,
        bonus=bonus,
        scale=scale,
        initial_state=entering,
        segment_ids=segment_ids,
        backend=backend,
    )
    at = functools.partial(attention_states_at, wide._replace(initial_state=entering))
    return out, state_after(final_state, at, places, q.shape[1], axis_name)


def linear_recurrence(
    a: Float[Array, "b t d"],
    b: Float[Array, "b t d"],
    *,
    axis_name: str,
    initial_state: Float[Array, "b d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    places: Int[Array, "b m"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b *places d"]]:
    """`frugax.kernels.linear_recurrence` with time split over the mesh axis `axis_name`.

    Here a state is as small as a token, so the recurrence runs from zero, and what enters the shard is added
    with the running product of a, which is the same recurrence with b = 0 started from one.

    Args:
      a, b, segment_ids, backend: as there; one shard of time.
      axis_name: a manual mesh axis of the `shard_map` around the call; shards are in the order of time.
      initial_state: the state before the first shard's first token, the same on every shard.
      places: tokens of the whole row [B, M]; the states after them are returned, -1 being the initial state.

    Returns:
      This shard's h [B, T, D], and the state after the last shard's last token, or [B, M, ...]
      those after `places`, the same on every shard.

    Raises:
      ValueError: as `frugax.kernels.linear_recurrence`.

    Source: Martin and Cundy 2018 (arXiv 1709.04057), whose scan composes the same maps.

    Example:
        >>> import frugax, jax, functools
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
        >>> split = P(None, "time")
        >>> f = functools.partial(frugax.parallel.linear_recurrence, axis_name="time")
        >>> x = jax.numpy.ones((1, 64, 16))
        >>> h, state = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=(split, P())))(x, x)
        >>> float(state[0, 0])
        64.0
    """
    call, dtype = dict(segment_ids=segment_ids, backend=backend), b.dtype
    b = b if places is None else b.astype(accumulator(dtype))  # a state is wide, wherever it is
    h_BTD, left_BD = kernels.linear_recurrence(a, b, **call)
    # Within documents zero times infinity is zero: after a zero, a product that has left the range is zero.
    ids = vary_like(jnp.zeros(a.shape[:2], jnp.int32), (a, b)) if segment_ids is None else segment_ids
    product_BTD, total_BD = kernels.linear_recurrence(
        _zero_times_infinity(a),
        jnp.zeros_like(b),
        initial_state=vary_like(jnp.ones_like(left_BD), (a, b)),
        segment_ids=ids,
        backend=backend,
    )
    entering_BD = entering_state(total_BD, left_BD, initial_state, segment_ids, axis_name)
    reached_BTD = jnp.broadcast_to(entering_BD[:, None], product_BTD.shape)
    packed = documents(segment_ids, *b.shape[:2])
    if packed is not None:  # the product is 0 there, but the state may be NaN
        reached_BTD = jnp.where(packed.index[..., None] == 0, reached_BTD, 0)
    h_BTD = (h_BTD + faded(product_BTD, reached_BTD)).astype(b.dtype)
    last_BD = left_BD + faded(total_BD, reached_BTD[:, -1])
    at = functools.partial(outputs_at, h_BTD, entering_BD)
    return h_BTD.astype(dtype), state_after(last_BD, at, places, b.shape[1], axis_name)


def _zero_times_infinity(x: Array) -> Array:
    """x with zeros in its gradient for NaN, which a product beyond the range makes of what nobody reads."""
    transpose = lambda _, g: jnp.where(jnp.isnan(g), 0, g)  # noqa: E731
    return jax.custom_derivatives.linear_call(lambda _, x: x, transpose, (), x)


def causal_conv1d(
    x: Float[Array, "b t d"],
    weight: Float[Array, "w d"],
    bias: Float[Array, "d"] | None = None,
    *,
    axis_name: str,
    activation: str | None = None,
    initial_state: Float[Array, "b w-1 d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    places: Int[Array, "b m"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b *places w-1 d"]]:
    """`frugax.kernels.causal_conv1d` with time split over the mesh axis `axis_name`: W-1 tokens move on.

    Args:
      x, weight, bias, activation, segment_ids, backend: as there; one shard of time of those that have it.
      axis_name: a manual mesh axis of the `shard_map` around the call; shards are in the order of time.
      initial_state: the W-1 inputs before the first shard's first token, the same on every shard.
      places: tokens of the whole row [B, M]; the states after them are returned, -1 being the initial state.

    Returns:
      This shard's y [B, T, D], and the last shard's last W-1 inputs, or [B, M, W-1, D] those up
      to `places`, the same on every shard.

    Raises:
      ValueError: as `frugax.kernels.causal_conv1d`, and for a shard of fewer than W-1 tokens.

    Source: Mamba (arXiv 2312.00752), where it comes before the scan.

    Example:
        >>> import frugax, jax, functools
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
        >>> split = P(None, "time")
        >>> f = functools.partial(frugax.parallel.causal_conv1d, axis_name="time")
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=(split, P()), out_specs=(split, P()))
        >>> y, state = jax.jit(f)(jax.numpy.ones((1, 64, 16)), jax.numpy.ones((4, 16)))
        >>> y.shape, state.shape
        ((1, 64, 16), (1, 3, 16))
    """
    call = conv.check(x, weight, bias, initial_state, segment_ids)
    if x.shape[1] < weight.shape[0] - 1:
        raise ValueError(
            f"x: got {x.dtype}{list(x.shape)} on a shard; expected {weight.shape[0] - 1} tokens (W-1) or more"
        )
    shards = jax.lax.axis_size(axis_name)
    right = [(i, i + 1) for i in range(shards - 1)]  # the first shard receives zeros
    entering = jax.lax.ppermute(conv.final_state(call._replace(initial_state=None)), axis_name, right)
    if segment_ids is not None:
        left_id = jax.lax.ppermute(segment_ids[:, -1], axis_name, right)
        entering = jnp.where((left_id == segment_ids[:, 0])[:, None, None], entering, 0)
    first = jax.lax.axis_index(axis_name) == 0
    entering = jnp.where(first, 0 if call.initial_state is None else call.initial_state, entering)
    entering = entering.astype(x.dtype)
    y, final_state = kernels.causal_conv1d(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=entering,
        segment_ids=segment_ids,
        backend=backend,
    )
    at = functools.partial(conv.states_at, call._replace(initial_state=entering))
    return y, state_after(final_state, at, places, x.shape[1], axis_name)


def state_left(call: attention.Inputs) -> tuple[Array, Array]:
    """The state S_BHKV that a shard's tokens leave, and the log of their total decay, [B, H, K, 1]."""
    dtype = accumulator(call.q.dtype)
    H = call.heads
    k_BTHK, v_BTHV = attention.repeat_heads(call.k, H), attention.repeat_heads(call.v, H)
    B, T = k_BTHK.shape[:2]
    g = jnp.zeros((H,), dtype) if call.log_decay is None else call.log_decay.astype(dtype)
    g = vary_like(g, call)
    g_BTHk = jnp.broadcast_to(
        g if g.ndim > 1 else g[None, None], (B, T, *g.shape[-(1 if g.ndim < 4 else 2) :])
    )
    g_BTHk = g_BTHk if g.ndim == 4 else g_BTHk[..., None]
    if call.runs is not None:  # the rest must not be multiplied by zeros, since it may be NaN
        of_last = (call.runs == call.runs[:, -1:])[..., None, None]
        k_BTHK, v_BTHV, g_BTHk = (jnp.where(of_last, x, 0) for x in (k_BTHK, v_BTHV, g_BTHk))
    later_BTHk = jnp.pad(g_BTHk[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    to_end_BTHk = jax.lax.cumsum(later_BTHk, axis=1, reverse=True)  # sums of decays only: never positive
    weight_BTHk = jnp.exp(to_end_BTHk)
    if g.ndim == 4:
        k_BTHK = (k_BTHK * weight_BTHk).astype(call.k.dtype)
    else:
        v_BTHV = (v_BTHV * weight_BTHk).astype(call.v.dtype)
    S_BHKV = jnp.einsum("bthk,bthv->bhkv", k_BTHK, v_BTHV, preferred_element_type=dtype, precision="highest")
    total_BHk = to_end_BTHk[:, 0] + g_BTHk[:, 0]
    return S_BHKV, jnp.broadcast_to(total_BHk, S_BHKV.shape[:3])[..., None]
