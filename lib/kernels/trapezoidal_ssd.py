"""Mamba-3's recurrence: Mamba-2's, whose input is a mean of this token's and the one's before."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from .common.arguments import accumulator, as_shaped, operand_dtype, rates, reject
from .common.documents import Documents, documents
from .common.operation import Backend
from .common.rows import outputs_at, rows
from .linear_attention import inputs, linear_attention
from .linear_attention.inputs import repeat_heads
from .linear_attention.states import states_at
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
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h p"], TrapezoidalState]:
    """Mamba-3's recurrence with the exponential trapezoidal rule, y_t = C_t h_t + D x_t with

    h_t = a_t h_{t-1} + (1 - mix_t) dt_t a_t B_{t-1} x_{t-1}^T + mix_t dt_t B_t x_t^T,  a_t = exp(dt_t A_t).

    One `linear_attention` takes all but a token's own input, with keys and values that come a token late:
    R_t = a_t R_{t-1} + a_t (mix_{t-1} dt_{t-1} + (1 - mix_t) dt_t) B_{t-1} x_{t-1}^T, so that
    h_t = R_t + mix_t dt_t B_t x_t^T.

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
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, ...] instead of its
        last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first.
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
    check_call(x, dt, A, B, C, mix, D, initial_state)
    read = rows(x.shape[:2], segment_ids, lengths, segment_states, reverse)
    if read is not None:
        x, dt, A, B, C, mix = map(read.read, (x, dt, A, B, C, mix))
        segment_ids = read.ids
    memory, B_first, x_first = (None, None, None) if initial_state is None else initial_state
    per_token = own_inputs(x, dt, B, mix)
    firsts = {"own": None, "B": B_first, "x": x_first}  # the memory before holds its token's own input
    qkvg = separated(per_token, dt, A, C, mix, firsts, documents(segment_ids, *x.shape[:2]))
    how = {"initial_state": memory, "segment_ids": segment_ids, "lengths": lengths}
    y, entered = linear_attention(*qkvg, scale=1.0, **how, backend=backend)
    y = joined(y, per_token, C, D)

    def at(places: Array) -> dict[str, Array]:
        return {n: outputs_at(z, firsts[n], places) for n, z in per_token.items()}

    def states(places: Array) -> TrapezoidalState:
        call = inputs.check(*qkvg, None, memory, segment_ids)
        return after(states_at(call, places), **at(places))

    if lengths is None:
        last = {n: z[:, -1] for n, z in per_token.items()}
    else:
        last = {n: z[:, 0] for n, z in at(jnp.asarray(lengths)[:, None] - 1).items()}
    state = after(entered, **last)
    return (y, state) if read is None else (read.write(y), read.states(state, states))


def own_inputs(x: Array, dt: Array, B: Array, mix: Array) -> dict[str, Array]:
    """The tokens' own inputs to the state, own B x^T, by its parts."""
    wide = accumulator(x.dtype)
    return {"own": mix.astype(wide) * dt.astype(wide), "B": B, "x": x}


def separated(
    tokens: dict[str, Array],
    dt: Array,
    A: Array,
    C: Array,
    mix: Array,
    before: Mapping[str, Array | None],
    packed: Documents | None,
) -> tuple[Array, Array, Array, Array]:
    """The q, k, v and log-decays of the linear attention that takes all but a token's own input.

    Args:
      tokens: from `own_inputs`.
      dt, A, C, mix: as given.
      before: the same parts of the token before the first [B, ...]; None: zeros.
      packed: the documents.
    """
    own_BTH, x = tokens["own"], tokens["x"]
    wide, operand = own_BTH.dtype, operand_dtype(x.dtype)
    dt, A, mix = dt.astype(wide), rates(A, wide), mix.astype(wide)
    own_late, B_late, x_late = (_a_token_late(tokens[n], before[n], packed) for n in ("own", "B", "x"))
    weight_BTH = jnp.exp(dt * A) * (own_late + (1 - mix) * dt)
    values = (weight_BTH[..., None] * x_late.astype(wide)).astype(operand)
    return C.astype(operand), B_late.astype(operand), values, dt * A


def joined(y: Array, tokens: dict[str, Array], C: Array, D: Array | None) -> Array:
    """The output [B, T, H, P] with the share of a token's own input and of D x, in x's dtype."""
    own_BTH, x = tokens["own"], tokens["x"]
    wide, H = own_BTH.dtype, x.shape[2]
    skip_BTH = own_BTH * repeat_heads(jnp.sum(C.astype(wide) * tokens["B"].astype(wide), axis=-1), H)
    if D is not None:
        skip_BTH = skip_BTH + D.astype(wide)[None, None]
    return (y.astype(wide) + skip_BTH[..., None] * x.astype(wide)).astype(x.dtype)


def after(entered: Array, own: Array, B: Array, x: Array) -> TrapezoidalState:
    """The state after a token: `entered` [..., H, N, P] lacks what the token itself adds."""
    wide = entered.dtype
    B_HN = repeat_heads(B.astype(wide), x.shape[-2], B.ndim - 2)
    return TrapezoidalState(entered + (own[..., None] * B_HN)[..., None] * x.astype(wide)[..., None, :], B, x)


def _a_token_late(x: Array, first: Array | None, packed: Documents | None) -> Array:
    """x_{t-1} [B, T, ...] for each token: `first` for a row's first, zeros for the first of a document."""
    first = jnp.zeros_like(x[:, 0]) if first is None else first.astype(x.dtype)
    late = jnp.concatenate([first[:, None], x[:, :-1]], axis=1)
    return late if packed is None else jnp.where(jnp.expand_dims(packed.starts, range(2, x.ndim)), 0, late)


def check_call(x, dt, A, B, C, mix, D, initial_state: TrapezoidalState | None) -> None:
    """Raise ValueError naming the argument that can't be right."""
    check(x, dt, None, B, C, D, None, None, None if initial_state is None else initial_state.memory)
    for name, y in (("A", A), ("mix", mix)):
        if y.shape != dt.shape or not jnp.issubdtype(y.dtype, jnp.floating):
            reject(name, y, f"floating {list(dt.shape)}")
    checkify.debug_check(jnp.all(A <= 0), "A: a value is positive; expected <= 0")
    checkify.debug_check(jnp.all(dt >= 0), "dt: a value is negative; expected >= 0")
