"""The elementwise linear recurrence: the public function, its checks, its dispatch and its gradient."""

from functools import partial

import jax
from jaxtyping import Array, Float, Int

from .. import dispatch
from ..dispatch import Backend
from ..sharding import Axes, align
from . import reference, xla
from .inputs import Inputs, as_shaped, check

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
    call = check(*(as_shaped(x) for x in (a, b, initial_state, segment_ids)), reverse)
    call = align(call, AXES, ("b", "d"))
    chosen, _ = _plan(call, backend)
    if set(chosen.values()) <= {"reference", "xla"}:
        return _run(_forward, chosen.items(), reverse, Axes((AXES,), RESULT_AXES), call)
    return _with_kernels(tuple(chosen.items()), bool(reverse), call)


def plan(a, b, *, initial_state=None, segment_ids=None, reverse=False, backend=None):
    """What `frugax.kernels.explain` prints: (platform -> backend, Pallas backend -> why not or None)."""
    arrays = [as_shaped(x) for x in (a, b, initial_state, segment_ids)]
    return _plan(jax.eval_shape(partial(check, reverse=reverse), *arrays), backend)


def _plan(call: Inputs, backend: str | None) -> tuple[dict[str, str], dict[str, str | None]]:
    from . import pallas_gpu, pallas_tpu  # here, so that CPU users never import Pallas

    reasons = {
        "pallas_tpu": pallas_tpu.unsupported_reason(call),
        "pallas_gpu": pallas_gpu.unsupported_reason(call),
    }
    return dispatch.plan("linear_recurrence", backend, reasons), reasons


def _forward(backend: str, interpret: bool):
    if backend in ("reference", "xla"):
        return {"reference": reference, "xla": xla}[backend].forward
    from . import pallas_gpu, pallas_tpu

    kernel = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}[backend]
    return partial(kernel.forward, interpret=interpret)


def _backward(backend: str, interpret: bool):
    if backend in ("reference", "xla"):

        def transpose(call, h, cotangents, reverse):
            return jax.vjp(lambda x: xla.forward(x, reverse), call)[1](cotangents)[0]

        return transpose
    from . import pallas_gpu, pallas_tpu

    kernel = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}[backend]
    return partial(kernel.backward, interpret=interpret)


def _run(which, chosen, reverse: bool, axes: Axes, *args):
    def implementation(backend, interpret):
        return partial(which(backend, interpret), reverse=reverse)

    chosen = dict(chosen)
    if chosen["cpu"].startswith("pallas_gpu"):
        axes = None  # jax 0.10's GPU interpreter has effects, which custom partitioning can't lower
    return dispatch.run(chosen, implementation, *args, axes=axes, independent=("b", "d"))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_kernels(chosen: tuple[tuple[str, str], ...], reverse: bool, call: Inputs):
    return _run(_forward, chosen, reverse, Axes((AXES,), RESULT_AXES), call)


def _with_kernels_fwd(chosen, reverse, call):
    h, state = _with_kernels(chosen, reverse, call)
    return (h, state), (call, h)


def _with_kernels_bwd(chosen, reverse, saved, cotangents):
    call, h = saved
    axes = Axes((AXES, "b t d", RESULT_AXES), AXES)
    return (_run(_backward, chosen, reverse, axes, call, h, cotangents),)


_with_kernels.defvjp(_with_kernels_fwd, _with_kernels_bwd)
