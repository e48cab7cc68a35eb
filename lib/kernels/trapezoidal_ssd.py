"""Mamba-3's recurrence: Mamba-2's, whose input is a mean of this token's and the one's before."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from .common.arguments import accumulator, as_shaped, reject
from .common.documents import documents
from .common.operation import Backend
from .linear_attention import linear_attention
from .linear_attention.inputs import repeat_heads
from .ssd import check


class TrapezoidalState(NamedTuple):
    """All that the next token needs: the state, and the last token's B and x."""

    memory: Array  # [B, H, N, P], float32
    B: Array  # [B, G, N]
    x: Array  # [B, H, P]


def trapezoidal_ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, "b t h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    mix: Float[Array, "b t h"],
    D: Float[Array, "h"] | None = None,
    *,
    initial_state: TrapezoidalState | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h p"], TrapezoidalState]:
    """Mamba-3's recurrence with the exponential trapezoidal rule, y_t = C_t h_t + D x_t with

    h_t = a_t h_{t-1} + (1 - mix_t) dt_t a_t B_{t-1} x_{t-1}^T + mix_t dt_t B_t x_t^T,  a_t = exp(dt_t A_t).

    Each token's input enters twice, now and with the next one: one `linear_attention` takes both at once, and
    what it read too early is taken off its output again.

    Args:
      x: the inputs [B, T, H, P], any floating dtype.
      dt: the step of each token and head [B, T, H], >= 0.
      A: the rate of each token and head [B, T, H], <= 0. A wrong sign of either is caught under
        `jax.experimental.checkify`, as in `linear_attention`.
      B, C: how inputs enter and leave the state [B, T, G, N], already rotated where the model rotates them.
      mix: share of a token's own input in its step [B, T, H], in [0, 1]; 1 is Mamba-2.
      D: weight of the input in the output [H]; None leaves it out.
      initial_state: what the last call returned; None starts afresh.
      segment_ids: the document of each token; nothing passes from one to the next. The initial state belongs
        to the first token's document.
      backend: as in `linear_attention`.

    Returns:
      y [B, T, H, P] in x's dtype, and the state.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in every float input.

    Source: Mamba-3, Lahoti et al. 2026 (arXiv 2603.15569): one input and output a head. Its rotation of B and
    C, their norms and biases are the caller's.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x, dt = jnp.ones((1, 100, 4, 16)), jnp.full((1, 100, 4), 0.1)
        >>> B = C = jax.random.normal(jax.random.key(0), (1, 100, 2, 8))
        >>> y, state = frugax.kernels.trapezoidal_ssd(x, dt, A=-dt, B=B, C=C, mix=dt)
        >>> y.shape, state.memory.shape
        ((1, 100, 4, 16), (1, 4, 8, 16))
    """
    x, dt, A, B, C, mix, D, segment_ids = map(as_shaped, (x, dt, A, B, C, mix, D, segment_ids))
    memory = None if initial_state is None else initial_state.memory
    check(x, dt, None, B, C, D, None, None, memory)
    _check_rows(dt, A, mix)
    checkify.debug_check(jnp.all(A <= 0), "A: a value is positive; expected <= 0")
    checkify.debug_check(jnp.all(dt >= 0), "dt: a value is negative; expected >= 0")
    wide, H = accumulator(x.dtype), x.shape[2]
    dt, A, mix = (rows.astype(wide) for rows in (dt, A, mix))

    # The token before enters at t with the weight late_t, and from then on decays as if it had at t - 1.
    late_BTH = (1 - mix) * dt
    entering = late_BTH[:, 0]
    packed = documents(segment_ids, *x.shape[:2])
    if packed is not None:
        late_BTH = jnp.where(packed.starts[..., None], 0, late_BTH)
    ahead_BTH = jnp.pad(late_BTH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    if initial_state is not None:
        memory, B_before, x_before = initial_state
        update = repeat_heads(B_before, H, 1)[..., None] * x_before[:, :, None]
        memory = memory + entering[..., None, None] * update
    y, memory = linear_attention(
        C.astype(x.dtype),
        B.astype(x.dtype),
        ((mix * dt + ahead_BTH)[..., None] * x).astype(x.dtype),
        dt * A,
        scale=1.0,
        initial_state=memory,
        segment_ids=segment_ids,
        backend=backend,
    )
    own_BTH = repeat_heads(jnp.sum(C.astype(wide) * B, axis=-1), H)
    skip_BTH = -ahead_BTH * own_BTH if D is None else D.astype(wide) - ahead_BTH * own_BTH
    y = y.astype(wide) + skip_BTH[..., None] * x
    return y.astype(x.dtype), TrapezoidalState(memory, B[:, -1], x[:, -1])


def _check_rows(dt, A, mix) -> None:
    """Raise ValueError unless A and mix have a number for each token and head, as dt does."""
    for name, rows in (("A", A), ("mix", mix)):
        if rows.shape != dt.shape or not jnp.issubdtype(rows.dtype, jnp.floating):
            reject(name, rows, f"floating {list(dt.shape)}")
