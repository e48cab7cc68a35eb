"""The elementwise linear recurrence: the public function, its checks, its dispatch and its gradient."""

from functools import partial

import jax
from jaxtyping import Array, Float, Int

from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation, only_xla
from ..common.sharding import Axes, align
from .inputs import Inputs, check

OPERATION = Operation("linear_recurrence", independent=("b", "d"))
AXES = Inputs("b t d", "b t d", "b d")
RESULT_AXES = ("b t d", "b d")


def linear_recurrence(
    a: Float[Array, "b t d"],
    b: Float[Array, "b t d"],
    *,
    initial_state: Float[Array, "b d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    reverse: bool = False,
    backend: Backend | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
    """First-order linear recurrence along time, h_t = a_t * h_{t-1} + b_t, one for each channel.

    Args:
      a: what multiplies the state. Any value will do: negative, zero, above 1; nothing divides by it.
      b: what is added to the state.
      initial_state: the state before the first token read; None means zeros.
      segment_ids: the document of each token; the state restarts wherever the id changes. The initial state
        belongs to the document of the first token read.
      reverse: read from the last token to the first, so h_t = a_t * h_{t+1} + b_t.
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
    call = check(as_shaped(a), as_shaped(b), as_shaped(initial_state), as_shaped(segment_ids), bool(reverse))
    call = align(call, AXES, OPERATION.independent)
    chosen, _ = OPERATION.plan(call, backend)
    run = _forward if only_xla(chosen) else _with_kernels
    return run(tuple(chosen.items()), bool(reverse), call)


def plan(a, b, *, initial_state=None, segment_ids=None, reverse=False, backend=None):
    """What `frugax.kernels.explain` prints: (platform -> backend, Pallas backend -> why not or None)."""
    arrays = [as_shaped(x) for x in (a, b, initial_state, segment_ids)]
    return OPERATION.plan(jax.eval_shape(partial(check, reverse=reverse), *arrays), backend)


def _forward(chosen: tuple[tuple[str, str], ...], reverse: bool, call: Inputs):
    return OPERATION.forward(dict(chosen), Axes((AXES,), RESULT_AXES), call, reverse=reverse)


_with_kernels = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))


def _with_kernels_fwd(chosen, reverse, call):
    h, state = _with_kernels(chosen, reverse, call)
    return (h, state), (call, h)


def _with_kernels_bwd(chosen, reverse, saved, cotangents):
    call, h = saved
    axes = Axes((AXES, "b t d", RESULT_AXES), AXES)
    return (OPERATION.backward(dict(chosen), axes, call, h, cotangents, reverse=reverse),)


_with_kernels.defvjp(_with_kernels_fwd, _with_kernels_bwd)
