"""Mamba-2's state-space dual: linear attention with one decay a head, by other names."""

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from .common.arguments import accumulator, as_shaped, operand_dtype, rates, reject
from .common.operation import Backend
from .common.rows import rows
from .linear_attention import linear_attention


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, "h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    D: Float[Array, "h"] | Float[Array, "h p"] | None = None,
    *,
    z: Float[Array, "b t h p"] | None = None,
    dt_bias: Float[Array, "h"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "b h n p"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b *m h n p"]]:
    """Mamba-2's recurrence, h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T and y_t = C_t h_t + D x_t.

    Args:
      x: the inputs [B, T, H, P], any floating dtype.
      dt: the step of each token and head [B, T, H], >= 0 after `dt_bias` and `dt_softplus`.
      A: one rate a head [H], <= 0.
      B, C: how inputs enter and leave the state [B, T, G, N], for G groups of H / G heads each.
      D: weight of the input in the output, [H] or [H, P]; None leaves it out.
      z: a gate; the output is multiplied by silu(z).
      dt_bias: added to dt [H].
      dt_softplus: dt goes through softplus, after the bias.
      initial_state: the state before the first token [B, H, N, P]; None means zeros.
      segment_ids: the document of each token; the state restarts wherever the id changes. The initial state
        belongs to the first token's document.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, ...] instead of its
        last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first.
      backend: as in `linear_attention`, which does the work.

    A positive A, or a negative dt, is caught under `jax.experimental.checkify`, as in `linear_attention`.

    Returns:
      y [B, T, H, P] in x's dtype, and the state after the last token [B, H, N, P] in float32 (float64 for
      float64 inputs), ready to be the next call's `initial_state`.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in every float input. `jax.jvp` and second derivatives: with backend "reference" or "xla".

    Source: Dao and Gu 2024 (arXiv 2405.21060).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x, dt = jnp.ones((1, 100, 4, 16)), jnp.full((1, 100, 4), 0.1)
        >>> B = C = jax.random.normal(jax.random.key(0), (1, 100, 2, 8))
        >>> y, state = frugax.kernels.ssd(x, dt, -jnp.ones(4), B, C, D=jnp.ones(4))
        >>> y.shape, state.shape
        ((1, 100, 4, 16), (1, 4, 8, 16))
    """
    x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids = map(
        as_shaped, (x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids)
    )
    check(x, dt, A, B, C, D, z, dt_bias, initial_state)
    real = rows(x.shape[:2], segment_ids, lengths)
    if real is not None:
        x, dt, B, C = map(real.read, (x, dt, B, C))
        z = None if z is None else real.read(z)
    v_BTHP, log_decay_BTH = values_and_decay(x, dt, A, dt_bias, dt_softplus)
    y, state = linear_attention(
        C.astype(v_BTHP.dtype),
        B.astype(v_BTHP.dtype),
        v_BTHP,
        log_decay_BTH,
        scale=1.0,
        initial_state=initial_state,
        segment_ids=segment_ids,
        lengths=lengths,
        segment_states=segment_states,
        reverse=reverse,
        backend=backend,
    )
    wide = accumulator(x.dtype)
    if D is not None:
        y = y.astype(wide) + D.astype(wide).reshape(1, 1, x.shape[2], -1) * x.astype(wide)
    if z is not None:
        y = y.astype(wide) * jax.nn.silu(z.astype(wide))
    y = y.astype(x.dtype)
    return (y if real is None else real.write(y)), state


def values_and_decay(x, dt, A, dt_bias, dt_softplus: bool) -> tuple[Array, Array]:
    """(dt x, dt A): what linear attention calls values and log-decays."""
    dt = dt.astype(accumulator(x.dtype))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dt.dtype)[None, None]
    if dt_softplus:
        dt = jax.nn.softplus(dt)
    checkify.debug_check(jnp.all(A <= 0), "A: a value is positive; expected <= 0")
    checkify.debug_check(jnp.all(dt >= 0), "dt: a value is negative; expected >= 0")
    v_BTHP = (x.astype(dt.dtype) * dt[..., None]).astype(operand_dtype(x.dtype))
    return v_BTHP, dt * rates(A, dt.dtype)[None, None]


def check(x, dt, A, B, C, D, z, dt_bias, initial_state) -> None:
    """Raise ValueError naming the argument that can't be right."""
    floats = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    for name, y in floats.items():
        if y is not None and not jnp.issubdtype(y.dtype, jnp.floating):
            reject(name, y, "a floating dtype")
    if x.ndim != 4 or 0 in x.shape:
        reject("x", x, "[batch, time, heads, P], every size >= 1")
    b, t, h, p = x.shape
    if dt.shape != (b, t, h):
        reject("dt", dt, f"[{b}, {t}, {h}] (x's batch, time and heads)")
    if A is not None and A.shape != (h,):
        reject("A", A, f"[{h}] (x's heads)")
    if B.ndim != 4 or B.shape[:2] != (b, t) or 0 in B.shape or h % B.shape[2]:
        reject("B", B, f"[{b}, {t}, groups, N], with groups that divide {h}")
    if C.shape != B.shape:
        reject("C", C, f"B's shape {list(B.shape)}")
    if D is not None and D.shape not in ((h,), (h, p)):
        reject("D", D, f"[{h}] or [{h}, {p}]")
    if z is not None and z.shape != x.shape:
        reject("z", z, f"x's shape {list(x.shape)}")
    if dt_bias is not None and dt_bias.shape != (h,):
        reject("dt_bias", dt_bias, f"[{h}]")
    n = B.shape[3]
    if initial_state is not None and initial_state.shape != (b, h, n, p):
        reject("initial_state", initial_state, f"[{b}, {h}, {n}, {p}]")
