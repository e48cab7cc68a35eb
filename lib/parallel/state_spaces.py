"""State-space models on one shard of time, inside `jax.shard_map`: as `sequence.py`, by the same maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from .. import kernels
from ..kernels.common.arguments import accumulator, rates
from ..kernels.common.documents import documents
from ..kernels.common.operation import Backend
from ..kernels.common.rows import outputs_at
from ..kernels.linear_attention import inputs as attention
from ..kernels.linear_attention.states import states_at as attention_states_at
from ..kernels.lmu import Method, free_response, power
from ..kernels.selective_scan import inputs as scan_inputs
from ..kernels.selective_scan.states import states_at as scan_states_at
from ..kernels.ssd import values_and_decay
from ..kernels.trapezoidal_ssd import TrapezoidalState, after, check_call, joined, own_inputs, separated
from .sequence import linear_attention, state_left
from .shards import entering_state, passed_on, state_after, tokens_before


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    D: Float[Array, "d"] | None = None,
    *,
    axis_name: str,
    z: Float[Array, "b t d"] | None = None,
    dt_bias: Float[Array, "d"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    places: Int[Array, "b m"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b *places d n"]]:
    """`frugax.kernels.selective_scan` with time split over the mesh axis `axis_name`.

    The kernel runs twice: from zeros, for the state that the shard's tokens leave, and from what enters. The
    decay of a whole shard is exp(A sum_t dt_t), so nothing of size T * N is made.

    Args:
      x, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, backend: as there; of those with time, one
        shard of it.
      axis_name: a manual mesh axis of the `shard_map` around the call; shards are in the order of time.
      initial_state: the state before the first shard's first token, the same on every shard.
      places: tokens of the whole row [B, M]; the states after them are returned, -1 being the initial state.

    Returns:
      This shard's y [B, T, D], and the state after the last shard's last token, or
      [B, M, ...] those after `places`, the same on every shard.

    Raises:
      ValueError: as `frugax.kernels.selective_scan`.

    Source: Gu and Dao 2023 (Mamba, arXiv 2312.00752); states pass between shards as in LASP-2 (2502.07563).

    Example:
        >>> import frugax, jax, functools
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
        >>> split, x, B, A = P(None, "time"), *(jax.numpy.ones(s) for s in ((1, 8, 4), (1, 8, 2), (4, 2)))
        >>> f = functools.partial(frugax.parallel.selective_scan, axis_name="time")
        >>> specs = (split, split, P(), split, split)
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=(split, P()))
        >>> y, state = jax.jit(f)(x, x, -A, B, B)
        >>> y.shape, state.shape
        ((1, 8, 4), (1, 4, 2))
    """
    scan = {"dt_bias": dt_bias, "dt_softplus": dt_softplus, "segment_ids": segment_ids, "backend": backend}
    _, left_BDN = kernels.selective_scan(x, dt, A, B, C, **scan)
    step = dt.astype(left_BDN.dtype)
    step = step if dt_bias is None else step + dt_bias.astype(step.dtype)[None, None]
    step = jax.nn.softplus(step) if dt_softplus else step
    total_BDN = jnp.exp(jnp.sum(step, axis=1)[..., None] * rates(A, step.dtype)[None])
    entering = entering_state(total_BDN, left_BDN, initial_state, segment_ids, axis_name)
    y, state = kernels.selective_scan(x, dt, A, B, C, D, z=z, initial_state=entering, **scan)

    def at(local: Array) -> Array:
        call = scan_inputs.check(x, dt, A, B, C, D, z, dt_bias, entering, segment_ids)
        return scan_states_at(call, dt_softplus, local)

    return y, state_after(state, at, places, x.shape[1], axis_name)


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, "h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
    *,
    axis_name: str,
    z: Float[Array, "b t h p"] | None = None,
    dt_bias: Float[Array, "h"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "b h n p"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    places: Int[Array, "b m"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b *places h n p"]]:
    """`frugax.kernels.ssd` with time split over the mesh axis `axis_name`: `linear_attention`'s way.

    Args:
      x, dt, A, B, C, D, z, dt_bias, dt_softplus, segment_ids, backend: as there; of those with time, one
        shard of it.
      axis_name: a manual mesh axis of the `shard_map` around the call; shards are in the order of time.
      initial_state: the state before the first shard's first token, the same on every shard.
      places: tokens of the whole row [B, M]; the states after them are returned, -1 being the initial state.

    Returns:
      This shard's y [B, T, H, P], and the state after the last shard's last token, or
      [B, M, ...] those after `places`, the same on every shard.

    Raises:
      ValueError: as `frugax.kernels.ssd`.

    Source: Dao and Gu 2024 (arXiv 2405.21060), section 8.2, which passes states between devices in turn.

    Example:
        >>> import frugax, jax, functools
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
        >>> split, x, dt, A = P(None, "time"), *(jax.numpy.ones(s) for s in ((1, 8, 2, 4), (1, 8, 2), (2,)))
        >>> f = functools.partial(frugax.parallel.ssd, axis_name="time")
        >>> specs = (split, split, P(), split, split)
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=(split, P()))
        >>> y, state = jax.jit(f)(x, dt, -A, x, x)
        >>> y.shape, state.shape
        ((1, 8, 2, 4), (1, 2, 4, 4))
    """
    v_BTHP, log_decay_BTH = values_and_decay(x, dt, A, dt_bias, dt_softplus)
    k, q = (y.astype(v_BTHP.dtype) for y in (B, C))
    call = attention.check(q, k, v_BTHP, log_decay_BTH, None, initial_state, segment_ids)
    S_BHNP, total_BHN1 = state_left(call)
    entering = entering_state(total_BHN1, S_BHNP, initial_state, segment_ids, axis_name, logs=True)
    y, state = kernels.ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=entering,
        segment_ids=segment_ids,
        backend=backend,
    )
    at = functools.partial(attention_states_at, call._replace(initial_state=entering))
    return y, state_after(state, at, places, x.shape[1], axis_name)


def lmu(
    u: Float[Array, "b t d"],
    order: int,
    theta: float,
    *,
    axis_name: str,
    initial_state: Float[Array, "b d n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    places: Int[Array, "b m"] | None = None,
    method: Method | None = None,
) -> tuple[Float[Array, "b t d n"], Float[Array, "b *places d n"]]:
    """`frugax.kernels.lmu` with time split over the mesh axis `axis_name`.

    The recurrence is linear and the same at all times: a shard runs from zeros, and adds what A^(t+1) leaves
    of the memory that enters.

    Args:
      u, order, theta, segment_ids, method: as there; one shard of time.
      axis_name: a manual mesh axis of the `shard_map` around the call; shards are in the order of time.
      initial_state: the memory before the first shard's first token, the same on every shard.
      places: tokens of the whole row [B, M]; the states after them are returned, -1 being the initial state.

    Returns:
      This shard's m [B, T, D, N], and the memory after the last shard's last token, or
      [B, M, ...] those after `places`, the same on every shard.

    Raises:
      ValueError: as `frugax.kernels.lmu`.

    Source: Chilkuri and Eliasmith 2021 (arXiv 2102.11417), whose parallel form rests on the same linearity.

    Example:
        >>> import frugax, jax, functools
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
        >>> split = P(None, "time")
        >>> f = functools.partial(frugax.parallel.lmu, order=4, theta=50.0, axis_name="time")
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=(split, P()))
        >>> m, state = jax.jit(f)(jax.numpy.ones((1, 200, 1)))
        >>> m.shape, abs(state).round(2).tolist()
        ((1, 200, 1, 4), [[[1.0, 0.0, 0.0, 0.0]]])
    """
    T, dtype = u.shape[1], accumulator(u.dtype)
    wide = u.astype(dtype)
    m_BTDN, left_BDN = kernels.lmu(wide, order, theta, segment_ids=segment_ids, method=method)
    fade = lambda A, m: jnp.einsum("bdj,ij->bdi", m, A.astype(m.dtype), precision="highest")  # noqa: E731
    over_shard = power(int(order), float(theta), T)
    entering_BDN = passed_on(fade, np.matmul, over_shard, left_BDN, initial_state, segment_ids, axis_name)
    faded_BTDN = free_response(entering_BDN, T, float(theta))
    packed = documents(segment_ids, *u.shape[:2])
    if packed is not None:
        faded_BTDN = jnp.where(packed.index[..., None, None] == 0, faded_BTDN, 0)
    m_BTDN = m_BTDN + faded_BTDN
    at = functools.partial(outputs_at, m_BTDN, entering_BDN)
    return m_BTDN.astype(u.dtype), state_after(m_BTDN[:, -1], at, places, T, axis_name)


def trapezoidal_ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, "b t h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    mix: Float[Array, "b t h"],
    D: Float[Array, "h"] | None = None,
    *,
    axis_name: str,
    initial_state: TrapezoidalState | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    places: Int[Array, "b m"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h p"], TrapezoidalState]:
    """`frugax.kernels.trapezoidal_ssd` with time split over the mesh axis `axis_name`.

    A shard's first token reads the last one of the shard before it, so one token of B, x and its weight moves
    on; the rest is `linear_attention`'s way.

    Args:
      x, dt, A, B, C, mix, D, segment_ids, backend: as there; of those with time, one shard of it.
      axis_name: a manual mesh axis of the `shard_map` around the call; shards are in the order of time.
      initial_state: the state before the first shard's first token, the same on every shard.
      places: tokens of the whole row [B, M]; the states after them are returned, -1 being the initial state.

    Returns:
      This shard's y [B, T, H, P], and the state after the last shard's last token, or those after `places`
      with M behind the first axis, the same on every shard.

    Raises:
      ValueError: as `frugax.kernels.trapezoidal_ssd`.

    Source: Mamba-3, Lahoti et al. 2026 (arXiv 2603.15569); states pass between shards as in LASP-2
    (2502.07563).

    Example:
        >>> import frugax, jax, functools
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("time",), axis_types=(AxisType.Auto,))
        >>> split, x, dt = P(None, "time"), *(jax.numpy.ones(s) for s in ((1, 8, 2, 4), (1, 8, 2)))
        >>> f = functools.partial(frugax.parallel.trapezoidal_ssd, axis_name="time")
        >>> f = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=(split, P()))
        >>> y, state = jax.jit(f)(x, dt, -dt, x, x, 0.5 * dt)
        >>> y.shape, state.memory.shape
        ((1, 8, 2, 4), (1, 2, 4, 4))
    """
    check_call(x, dt, A, B, C, mix, D, initial_state)
    T, packed = x.shape[1], documents(segment_ids, *x.shape[:2])
    memory, *first = (None, None, None) if initial_state is None else initial_state
    tokens = own_inputs(x, dt, B, mix)
    # The memory that enters a row holds its last token's own input; a shard's is still to come.
    firsts: dict[str, Array | None] = {"own": None} | dict(zip(("B", "x"), first, strict=True))
    before = {}
    for name, y in tokens.items():
        one = firsts[name]
        before[name] = tokens_before(y, 1, None if one is None else one[:, None], axis_name)[:, 0]
    if segment_ids is not None:
        left_id = tokens_before(segment_ids, 1, None, axis_name)[:, 0]
        goes_on = (left_id == segment_ids[:, 0]) | (jax.lax.axis_index(axis_name) == 0)
        before = {n: jnp.where(jnp.expand_dims(goes_on, range(1, y.ndim)), y, 0) for n, y in before.items()}
    y, memory = linear_attention(
        *separated(tokens, dt, A, C, mix, before, packed),
        axis_name=axis_name,
        scale=1.0,
        initial_state=memory,
        segment_ids=segment_ids,
        places=places,
        backend=backend,
    )
    last = {n: z[:, -1] for n, z in tokens.items()}
    at = lambda local: {n: outputs_at(z, firsts[n], local) for n, z in tokens.items()}  # noqa: E731
    state = after(memory, **state_after(last, at, places, T, axis_name))
    return joined(y, tokens, C, D), state
