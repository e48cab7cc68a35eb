"""Mamba's selective scan: the public function."""

from functools import partial

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from ..common.rows import rows
from .inputs import Inputs, check, in_reading_order, step_size
from .states import states_at

OPERATION = Operation(
    "selective_scan",
    Inputs("b t d", "b t d", "d n", "b t n", "b t n", "d", "b t d", "d", "b d n", "b t"),
    ("b t d", "b d n"),
    independent=("b", "d"),
    sequence="x",
    extra="b c n d",  # the state before every 128 tokens, as the TPU's kernel lays it out
)


def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    D: Float[Array, "d"] | None = None,
    *,
    z: Float[Array, "b t d"] | None = None,
    dt_bias: Float[Array, "d"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "b d n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b *m d n"]]:
    """Mamba's recurrence, h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = (C_t h_t + D x_t) silu(z_t).

    Args:
      x: the inputs, one for each channel [B, T, D].
      dt: how far each token moves each channel's state, >= 0, in the unit that A is per.
      A: the rate of each of the N states of each channel, <= 0. A positive value, or a negative dt (its
        bias added), is caught under `jax.experimental.checkify` (`all_checks` or `user_checks`).
      B: how a token's input enters the states, the same for all channels [B, T, N].
      C: how the states make up the output [B, T, N].
      D: weight of the input in the output [D]; None for none.
      z: gates the output by silu(z) [B, T, D]; None for no gate.
      dt_bias: added to dt, before the softplus [D].
      dt_softplus: whether dt passes through softplus.
      initial_state: the state before the first token; None means zeros.
      segment_ids: the document of each token; the state restarts wherever the id changes. The initial state
        belongs to the first token's document.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, ...] instead of its
        last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first.
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted.

    Returns:
      y [B, T, D] in x's dtype, and the state after the last token [B, D, N] in float32 (float64 if x or dt
      is), ready to be the next call's `initial_state`. Decoding is this call with T = 1.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in every float input. Of the states, which are N times as large as x, TPUs keep one every
    128 tokens for the backward pass, which computes the others anew. `jax.jvp` and second derivatives: with
    backend "reference" or "xla".

    Source: Gu and Dao 2023 (Mamba, arXiv 2312.00752), algorithm 2 with real A.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x, dt = jax.random.normal(jax.random.key(0), (2, 1, 100, 64))
        >>> B, C = jax.random.normal(jax.random.key(1), (2, 1, 100, 16))
        >>> A = -jnp.broadcast_to(jnp.arange(1.0, 17.0), (64, 16))
        >>> y, state = frugax.kernels.selective_scan(x, dt, A, B, C, dt_softplus=True)
        >>> y.shape, state.shape
        ((1, 100, 64), (1, 64, 16))
    """
    arrays = (x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids)
    call, softplus = check(*map(as_shaped, arrays)), bool(dt_softplus)
    checkify.debug_check(jnp.all(call.A <= 0), "A: a value is positive; expected <= 0")
    if not softplus:
        checkify.debug_check(jnp.all(step_size(call, False) >= 0), "dt: a value is negative; expected >= 0")
    read = rows(call.x.shape[:2], segment_ids, lengths, segment_states, reverse)
    if read is not None:
        call = in_reading_order(call, read, softplus)
    y, state = OPERATION(call, backend, softplus=softplus)
    return (
        (y, state)
        if read is None
        else (read.write(y), read.states(state, partial(states_at, call, softplus)))
    )
