"""The Legendre delay system of the LMU: a window of the past as a few polynomial coefficients."""

import functools
import itertools
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .common.arguments import accumulator, as_shaped, known, reject
from .common.documents import check_segment_ids, documents
from .common.operation import Choice, record_choice
from .common.rows import outputs_at, rows
from .common.sharding import vary_like

Method = Literal["chunks", "fft", "recurrent"]

# On CPU the loop: up to order 64 a convolution takes 1.4 to 5 times as long at every length from 4 to 256
# tokens, at order 256 it takes 0.6 to 1.7 times as long (benchmarks/results/lmu_cpu.json, one core). On TPU
# and GPU, where each step of a loop waits for the last, chunks from this many tokens on: not measured.
_CHUNKS_FROM = 16
_CHUNK = 32  # tokens


def lmu(
    u: Float[Array, "b t d"],
    order: int,
    theta: float,
    *,
    initial_state: Float[Array, "b d n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
    reverse: bool = False,
    method: Method | None = None,
) -> tuple[Float[Array, "b t d n"], Float[Array, "b *m d n"]]:
    """Legendre memory of each channel's last `theta` samples, m_t = A m_{t-1} + B u_t.

    A and B discretize the delay system by zero-order hold with one token as the step. The window is read off
    the memory by Legendre polynomials: u_{t-s} is about sum_n P_n((2 s + 1) / theta - 1) m_t[n] for s from 0
    to theta - 1, the better the higher the order.

    Args:
      u: the samples [B, T, D], each channel a signal of its own.
      order: how many coefficients N >= 1.
      theta: the window's length in tokens, > 0.
      initial_state: the memory before the first token [B, D, N]; None means zeros.
      segment_ids: the document of each token; the memory restarts wherever the id changes. The initial state
        belongs to the first token's document. "recurrent" alone takes them.
      lengths: how many tokens of each row are real [B]; None means all. Those after them are not read, so
        nothing that stands there matters; their outputs are zeros.
      segment_states: return the states after each of a row's first N documents [B, N, ...] instead of its
        last; zeros for documents that a row does not have.
      reverse: read each row from its last real token to its first.
      method: "recurrent" (a loop), "chunks" (products over 32 tokens, and a loop over those) or "fft" (one
        convolution over all tokens, whose rounding lets a sample change the last digits of earlier memories).
        None takes the loop on CPU, elsewhere for streams and segment_ids alone.

    Returns:
      m [B, T, D, N] in u's dtype, and the last memory [B, D, N] in float32 (float64 for float64 inputs),
      ready to be the next call's `initial_state`.

    Raises:
      ValueError: naming the argument that can't be right.

    Differentiable in u and in the initial state, forwards and backwards, to any order.

    Source: Voelker, Kajic and Eliasmith 2019 (NeurIPS, "Legendre Memory Units"); as a convolution from
    Chilkuri and Eliasmith 2021 (arXiv 2102.11417).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> u = jnp.ones((1, 200, 1))
        >>> m, state = frugax.kernels.lmu(u, order=4, theta=50.0)
        >>> m.shape, abs(state).round(2).tolist()  # a constant is its own first coefficient
        ((1, 200, 1, 4), [[[1.0, 0.0, 0.0, 0.0]]])
    """
    u, initial_state, segment_ids = map(as_shaped, (u, initial_state, segment_ids))
    _check(u, order, theta, initial_state, segment_ids, method)
    B, T, D = u.shape
    read = rows((B, T), segment_ids, lengths, segment_states, reverse)
    if read is not None:
        u, segment_ids = read.read(u), read.ids
    wide = u.astype(accumulator(u.dtype))
    m0 = jnp.zeros((B, D, order)) if initial_state is None else initial_state
    m0 = vary_like(m0.astype(wide.dtype), (wide, m0))

    def convolution(wide, m0):
        m = _convolution(wide, int(order), float(theta))
        return m if initial_state is None else m + free_response(m0, T, float(theta))

    def recurrence(wide, m0):
        return _recurrence(wide, m0, float(theta), segment_ids)

    def chunks(wide, m0):
        return _in_chunks(wide, m0, float(theta))

    forms = {"chunks": chunks, "fft": convolution, "recurrent": recurrence}
    chosen = _methods(u, segment_ids, method)
    record_choice(lambda: Choice("lmu", {place: f"xla ({form})" for place, form in chosen.items()}, {}))
    on_cpu, elsewhere = forms[chosen["cpu"]], forms[chosen["tpu"]]
    if on_cpu is elsewhere:
        m = on_cpu(wide, m0)
    else:
        m = jax.lax.platform_dependent(wide, m0, cpu=on_cpu, default=elsewhere)
    if read is None:
        return m.astype(u.dtype), m[:, -1]
    return read.write(m.astype(u.dtype)), read.states_by_place(m[:, -1], partial(outputs_at, m, m0))


def _methods(u, segment_ids, method: Method | None) -> dict[str, Method]:
    """The method of each platform."""
    in_chunks = segment_ids is None and known(u.shape[1]) and u.shape[1] >= _CHUNKS_FROM
    elsewhere: Method = "chunks" if in_chunks else "recurrent"
    return {"cpu": method or "recurrent", "tpu": method or elsewhere, "cuda": method or elsewhere}


@functools.lru_cache(maxsize=32)
def _system(order: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """The discrete A [N, N] and B [N], in float64."""
    import scipy.linalg  # a tenth of a second, which no other operation needs

    i, j = np.mgrid[:order, :order]
    a = (2 * i + 1) / theta * np.where(i < j, -1.0, (-1.0) ** (i - j + 1))
    n = np.arange(order)
    b = (2 * n + 1) / theta * (-1.0) ** n
    # exp([[A, B], [0, 0]]) holds both: exp(A), and the integral of exp(A s) B over the step.
    both = scipy.linalg.expm(np.block([[a, b[:, None]], [np.zeros((1, order + 1))]]))
    return both[:order, :order], both[:order, order]


@functools.lru_cache(maxsize=8)
def _impulse_response(order: int, theta: float, length: int) -> np.ndarray:
    """A^t B for t = 0 .. length - 1, in float64 [length, N]."""
    power, b = _system(order, theta)
    response = b[None]
    while len(response) < length:  # twice as long each time
        response = np.concatenate([response, response @ power.T])
        power = power @ power
    return response[:length]


def _convolution(u_BTD: Array, order: int, theta: float) -> Array:
    """m from zeros [B, T, D, N]: u convolved with what one impulse leaves behind."""
    T = u_BTD.shape[1]
    response_TN = jnp.asarray(_impulse_response(order, theta, T), u_BTD.dtype)
    length = 2 << (T - 1).bit_length()  # room for the convolution not to wrap around
    product = (
        jnp.fft.rfft(u_BTD, length, axis=1)[..., None] * jnp.fft.rfft(response_TN, length, axis=0)[:, None]
    )
    return jnp.fft.irfft(product, length, axis=1)[:, :T]


def free_response(m_BDN: Array, T: int, theta: float) -> Array:
    """A^(t+1) m for t = 0 .. T - 1 [B, T, D, N]: how a memory fades without input."""
    power, _ = _system(m_BDN.shape[-1], theta)

    def applied(m, power):
        return jnp.einsum("...j,ij->...i", m, jnp.asarray(power, m.dtype), precision="highest")

    m_BTDN = applied(m_BDN, power)[:, None]
    while m_BTDN.shape[1] < T:
        m_BTDN = jnp.concatenate([m_BTDN, applied(m_BTDN, power)], axis=1)
        power = power @ power
    return m_BTDN[:, :T]


def power(order: int, theta: float, tokens: int) -> np.ndarray:
    """A^tokens [N, N] in float64: what is left of a memory after so many tokens without input."""
    return np.linalg.matrix_power(_system(order, theta)[0], tokens)


def _in_chunks(u_BTD: Array, m_BDN: Array, theta: float) -> Array:
    """m [B, T, D, N] in chunks of C tokens: what their own samples leave, and what is left of older ones."""
    (B, T, D), N, C = u_BTD.shape, m_BDN.shape[-1], _CHUNK
    response_CN = _impulse_response(N, theta, C)
    since = np.arange(C)[:, None] - np.arange(C)
    toeplitz = np.where((since >= 0)[..., None], response_CN[np.maximum(since, 0)], 0)
    power, _ = _system(N, theta)
    fade = np.stack(list(itertools.accumulate([power] * C, np.matmul)))
    spread_CCN, fade_CNN = (jnp.asarray(x, u_BTD.dtype) for x in (toeplitz, fade))
    u_BLCD = jnp.pad(u_BTD, ((0, 0), (0, -T % C), (0, 0))).reshape(B, -1, C, D)
    own_BLCDN = jnp.einsum("blsd,csn->blcdn", u_BLCD, spread_CCN, precision="highest")

    def step(m_BDN, own_BDN):
        return jnp.einsum("bdj,ij->bdi", m_BDN, fade_CNN[-1], precision="highest") + own_BDN, m_BDN

    _, before = jax.lax.scan(step, m_BDN, jnp.moveaxis(own_BLCDN[:, :, -1], 1, 0))
    faded_BLCDN = jnp.einsum("lbdj,cij->blcdi", before, fade_CNN, precision="highest")
    return (own_BLCDN + faded_BLCDN).reshape(B, -1, D, N)[:, :T]


def _recurrence(u_BTD: Array, m_BDN: Array, theta: float, segment_ids: Array | None) -> Array:
    A_NN, B_N = (jnp.asarray(x, u_BTD.dtype) for x in _system(m_BDN.shape[-1], theta))
    packed = documents(segment_ids, *u_BTD.shape[:2])
    starts = jnp.zeros(u_BTD.shape[:2], bool) if packed is None else packed.starts

    def step(m_BDN, token):
        u_BD, start_B = token
        m_BDN = jnp.where(start_B[:, None, None], 0, m_BDN)
        m_BDN = (
            jnp.einsum("bdj,ij->bdi", m_BDN, A_NN, precision="highest") + u_BD[..., None] * B_N[None, None]
        )
        return m_BDN, m_BDN

    tokens = (jnp.moveaxis(u_BTD, 1, 0), jnp.moveaxis(starts, 1, 0))
    return jnp.moveaxis(jax.lax.scan(step, m_BDN, tokens)[1], 0, 1)


def _check(u, order, theta, initial_state, segment_ids, method) -> None:
    """Raise ValueError naming the argument that can't be right."""
    if not jnp.issubdtype(u.dtype, jnp.floating) or u.ndim != 3 or 0 in u.shape:
        reject("u", u, "floating [batch, time, channels], every size >= 1")
    if order < 1 or int(order) != order:
        raise ValueError(f"order: got {order}; expected a whole number >= 1")
    if not theta > 0:
        raise ValueError(f"theta: got {theta}; expected a number of tokens above 0")
    if method not in (None, *get_args(Method)):
        raise ValueError(f"method: got {method!r}; expected {', '.join(map(repr, get_args(Method)))} or None")
    B, T, D = u.shape
    if initial_state is not None and (
        initial_state.shape != (B, D, order) or not jnp.issubdtype(initial_state.dtype, jnp.floating)
    ):
        reject("initial_state", initial_state, f"floating [{B}, {D}, {order}]")
    if segment_ids is not None:
        check_segment_ids(segment_ids, (B, T))
        if method not in (None, "recurrent"):
            raise ValueError(
                f"segment_ids: method {method!r} knows no documents; expected method 'recurrent' or None"
            )
