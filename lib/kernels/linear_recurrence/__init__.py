"""The elementwise linear recurrence: the public function."""

from functools import partial

from jaxtyping import Array, Float, Int

from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from ..common.rows import outputs_at, rows
from .inputs import Inputs, check

OPERATION = Operation(
    "linear_recurrence",
    Inputs("b t d", "b t d", "b d", "b t"),
    ("b t d", "b d"),
    independent=("b", "d"),
    keeps=(0,),  # h
)


def linear_recurrence(
    a: Float[Array, "b t d"],
    b: Float[Array, "b t d"],
    *,
    initial_state: Float[Array, "b d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b *n d"]]:
    """First-order linear recurrence along time, h_t = a_t * h_{t-1} + b_t, one for each channel.

    Args:
      a: what multiplies the state. Any value will do: negative, zero, above 1; nothing divides by it.
      b: what is added to the state.
      initial_state: the state before the first token read; None means zeros.
      segment_ids: the document of each token; the state restarts wherever the id changes. The initial state
        belongs to the document of the first token read.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, D] instead of its last;
        zeros for documents that a row does not have.
      reverse: read from the last real token to the first, so h_t = a_t * h_{t+1} + b_t.
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted.

    Returns:
      h [B, T, D] in b's dtype, and the state after the last token read (token 0 if `reverse`) [B, D] in
      float32 (float64 if a or b is), ready to be the next call's `initial_state`.

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.

    Differentiable in every float input, with a and h kept for the backward pass and nothing else of size T.
    `jax.jvp` and second derivatives: with backend "reference" or "xla".

    Source: Martin and Cundy 2018 (arXiv 1709.04057); what RG-LRU (2402.19427), HGRN (2311.04823) and
    MatMul-free LM's MLGRU (2406.02528) run on.

    Example:
        >>> import frugax, jax
        >>> a = jax.nn.sigmoid(jax.random.normal(jax.random.key(0), (2, 100, 64)))
        >>> h, state = frugax.kernels.linear_recurrence(a, 1 - a)
        >>> h.shape, state.shape
        ((2, 100, 64), (2, 64))
    """
    a, b, initial_state, segment_ids = map(as_shaped, (a, b, initial_state, segment_ids))
    call = check(a, b, initial_state, segment_ids, bool(reverse))
    read = rows(call.b.shape[:2], segment_ids, lengths, segment_states, reverse)
    if read is None or (read.lengths is None and read.segment_states is None):
        return OPERATION(call, backend, reverse=bool(reverse))
    wide = b if segment_states is None else b.astype(call.initial_state.dtype)
    call = check(read.read(a, 1), read.read(wide), initial_state, read.ids, False)
    h, state = OPERATION(call, backend, reverse=False)
    states = read.states(state, partial(outputs_at, h, call.initial_state))
    return read.write(h).astype(b.dtype), states
