"""The depthwise causal convolution of Mamba-style mixers: the public function."""

from functools import partial

from jaxtyping import Array, Float, Int

from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from ..common.rows import rows
from .inputs import Inputs, check, check_activation, final_state, states_at

OPERATION = Operation(
    "causal_conv1d", Inputs("b t d", "w d", "d", "b s d", "b t"), "b t d", independent=("b", "d")
)


def causal_conv1d(
    x: Float[Array, "b t d"],
    weight: Float[Array, "w d"],
    bias: Float[Array, "d"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "b w-1 d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b *n w-1 d"]]:
    """Depthwise causal convolution, y_t = act(bias + sum_w weight_w * x_{t-(W-1)+w}), channel by channel.

    Args:
      x: the inputs [B, T, D], any floating dtype; sums are float32 (float64 for float64 inputs).
      weight: one filter of W >= 1 taps for each channel [W, D]; the last tap is the token's own.
      bias: [D], or None for none.
      activation: None, or "silu" ("swish" is its other name).
      initial_state: the W-1 inputs before the first token [B, W-1, D], read in x's dtype; None means zeros.
      segment_ids: the document of each token; no tap reaches into another document. The initial state
        belongs to the first token's document.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, ...] instead of its
        last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first.
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted.

    Returns:
      y [B, T, D] in x's dtype, and the last W-1 inputs [B, W-1, D] in x's dtype, ready to be the next call's
      `initial_state`: zeros stand for those of documents other than the last token's.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in every float input. `jax.jvp` and second derivatives: with backend "reference" or "xla".

    Source: the short convolution of H3 (Fu et al. 2022, arXiv 2212.14052) and Mamba (2312.00752).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> x = jnp.arange(1.0, 5.0)[None, :, None]
        >>> y, state = frugax.kernels.causal_conv1d(x, jnp.array([[10.0], [1.0]]))
        >>> y.ravel().tolist(), state.ravel().tolist()
        ([1.0, 12.0, 23.0, 34.0], [4.0])
    """
    weight, bias, initial_state = map(as_shaped, (weight, bias, initial_state))
    call = check(as_shaped(x), weight, bias, initial_state, as_shaped(segment_ids))
    read = rows(call.x.shape[:2], segment_ids, lengths, segment_states, reverse)
    if read is not None:
        call = check(read.read(call.x), weight, bias, initial_state, read.ids)
    y = OPERATION(call, backend, activation=check_activation(activation))
    last = final_state(call)  # W-1 rows: XLA's work, and its gradient, whatever runs the rest
    return (
        (y, last) if read is None else (read.write(y), read.states_by_place(last, partial(states_at, call)))
    )
