"""Recurrent networks with a matrix for each head: the public function."""

from functools import partial

from jaxtyping import Array, Float, Int

from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from ..common.rows import rows
from .inputs import Inputs, check, in_reading_order
from .states import states_at

OPERATION = Operation(
    "rnn",
    Inputs("b t h g d", "h g i d", "h g d", "b s h d", "b t"),
    ("b t h d", "b s h d"),
    independent=("b", "h"),
    sequence="gates",
    keeps=(0,),  # h
    extra="t h r b d",  # the states that each token's step read, as the kernels lay them out
)


def rnn(
    gates: Float[Array, "b t h g d"],
    recurrent: Float[Array, "h g d d"],
    bias: Float[Array, "h g d"] | None = None,
    *,
    cell: str = "lstm",
    initial_state: Float[Array, "b s h d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b *n s h d"]]:
    """A recurrent network over time, whose heads each have a recurrent matrix for every gate.

    With x_g = gates[..., g, :], R_g h = h @ recurrent[head, g], y_g = x_g + R_g h_{t-1} + b_g, s = sigmoid:

        lstm   gates i, f, z, o; states h, c: c_t = s(y_f) c_{t-1} + s(y_i) tanh(y_z); h_t = s(y_o) tanh(c_t)
        gru    gates r, z, n; state h: n = tanh(x_n + s(y_r) (R_n h_{t-1} + b_n));
               h_t = s(y_z) h_{t-1} + (1 - s(y_z)) n
        elman  one gate; state h: h_t = tanh(y)
        slstm  gates i, f, z, o; states h, c, n, m: m_t = max(y_i, log s(y_f) + m_{t-1});
               i, f = exp(y_i - m_t), exp(log s(y_f) + m_{t-1} - m_t);
               c_t = f c_{t-1} + i tanh(y_z); n_t = f n_{t-1} + i; h_t = s(y_o) c_t / n_t

    Args:
      gates: the inputs times their matrices, W x [B, T, H, G, D]; G gates of D channels in each of H heads.
      recurrent: R [H, G, D, D], input channels before output channels, in gates' dtype.
      bias: b [H, G, D], in gates' dtype; None means zeros. A GRU's n has it inside the reset, as in
        cuDNN; a second one, outside, belongs into `gates`.
      cell: "lstm", "gru", "elman" or "slstm".
      initial_state: the states before the first token [B, S, H, D], in the cell's order; None means zeros. An
        sLSTM's c and m are not read where its n is zero: nothing was read yet.
      segment_ids: the document of each token; the state restarts wherever the id changes. The initial state
        belongs to the first token's document.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, ...] instead of its
        last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first.
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted. Kernels hold a head's R on chip: an
        LSTM's up to D = 2048 in bfloat16 on TPU, 128 on Hopper, which takes bfloat16 alone; larger heads get
        "xla", and `explain` says which limit is in the way.

    Returns:
      h [B, T, H, D] in gates' dtype, and the states after the last token [B, S, H, D] in float32 (float64 for
      float64 gates), ready to be the next call's `initial_state`.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in every float input. The gradient keeps h and what a cell reads (c; h; none; c, n, m) of
    every token. `jax.jvp` and second derivatives: with backend "reference" or "xla".

    Source: FlashRNN, Pöppel et al. 2024 (arXiv 2412.07752); the sLSTM is xLSTM's (2405.04517). FlashRNN's
    code also keeps n at 1 or more, which it is after any token.

    Example:
        >>> import frugax, jax
        >>> keys = jax.random.split(jax.random.key(0))
        >>> gates = jax.random.normal(keys[0], (2, 100, 4, 4, 32))
        >>> recurrent = jax.random.normal(keys[1], (4, 4, 32, 32)) / 32**0.5
        >>> h, state = frugax.kernels.rnn(gates, recurrent, cell="lstm")
        >>> h.shape, state.shape
        ((2, 100, 4, 32), (2, 2, 4, 32))
    """
    arrays = [as_shaped(x) for x in (gates, recurrent, bias, initial_state, segment_ids)]
    call = check(*arrays, cell=cell)
    read = rows(call.gates.shape[:2], segment_ids, lengths, segment_states, reverse)
    if read is None:
        return OPERATION(call, backend)
    call = in_reading_order(call, read)
    h, state = OPERATION(call, backend)
    return read.write(h), read.states_by_place(state, partial(states_at, call, h))
