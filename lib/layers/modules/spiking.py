"""Spiking neurons: what crosses a threshold becomes a 1, and a smooth slope stands in for the step's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...kernels.common.arguments import accumulator, as_shaped, reject
from ...kernels.common.documents import check_segment_ids, documents
from ...kernels.common.rows import outputs_at, rows
from ...parallel.over_time import refuse_split_time

_SLOPE = 4.0  # of the sigmoid whose derivative stands in for the step's


@jax.custom_jvp
def spike(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 where x >= 0, else 0; differentiated as if it were sigmoid(4 x).

    Args:
      x: by how much each membrane is above its threshold, any shape.

    Returns:
      Zeros and ones in x's dtype. Its derivative is 4 s (1 - s) with s = sigmoid(4 x): 1 at the threshold,
      0.07 at a distance of 1. Forwards and backwards, to any order.

    Source: surrogate gradients, Neftci, Mostafa and Zenke 2019 (arXiv 1901.09948).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jnp.array([-1.0, 0.0, 1.0])
        >>> frugax.layers.spike(x).tolist(), jax.vmap(jax.grad(frugax.layers.spike))(x).round(2).tolist()
        ([0.0, 1.0, 1.0], [0.07..., 1.0, 0.07...])
    """
    return (x >= 0).astype(x.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    s = jax.nn.sigmoid(_SLOPE * x)
    return spike(x), (_SLOPE * s * (1 - s) * tangent).astype(x.dtype)


def lif(
    x: Float[Array, "b t d"],
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    initial_state: Float[Array, "b d"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    lengths: Int[Array, "b"] | None = None,
    segment_states: int | None = None,
) -> tuple[Float[Array, "b t d"], Float[Array, "b *n d"]]:
    """Leaky integrate-and-fire neurons: v_t = v_{t-1} + (x_t - v_{t-1}) / tau; a spike sets v back to 0.

    Args:
      x: the current into each neuron [B, T, D].
      tau: tokens in which a membrane forgets, >= 1; with 1 it remembers nothing.
      threshold: the membrane's potential from which it fires, > 0.
      initial_state: the potentials before the first token [B, D]; None means 0.
      segment_ids: the document of each token; potentials are 0 wherever the id changes. The initial state
        belongs to the first token's document.
      lengths, segment_states: as in `Mixer`.

    Returns:
      Spikes, 0 or 1, [B, T, D] in x's dtype, and the potentials after the last token [B, D] in float32
      (float64 for float64 inputs), ready to be the next call's `initial_state`.

    Raises:
      ValueError: naming the argument that can't be right.

    Differentiable as `spike` is; the gradient doesn't pass through the reset. The reset makes it a loop over
    time: no parallel form has the same numbers.

    Source: the neurons of LMUFormer, Liu et al. 2024 (arXiv 2402.04882).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> spikes, v = frugax.layers.lif(jnp.full((1, 6, 1), 1.5))  # v: 0.75, 1.125, then 0 again
        >>> spikes[0, :, 0].tolist(), v.tolist()
        ([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], [[0.0]])
    """
    x, initial_state, segment_ids = map(as_shaped, (x, initial_state, segment_ids))
    _check(x, tau, threshold, initial_state, segment_ids)
    refuse_split_time("lif", "a spike resets the potential, so a token is no affine map of the one before")
    dtype = accumulator(x.dtype)
    B, T, D = x.shape
    v = jnp.zeros((B, D), dtype) if initial_state is None else initial_state.astype(dtype)
    read = rows((B, T), segment_ids, lengths, segment_states)
    if read is not None:
        x, segment_ids = read.read(x), read.ids
    packed = documents(segment_ids, B, T)
    starts_BT = jnp.zeros((B, T), bool) if packed is None else packed.starts

    def step(v_BD, token):
        x_BD, start_B = token
        v_BD = jnp.where(start_B[:, None], 0, v_BD)
        v_BD = v_BD + (x_BD - v_BD) / tau
        fired_BD = spike(v_BD - threshold)
        v_BD = v_BD * (1 - jax.lax.stop_gradient(fired_BD))
        return v_BD, (fired_BD, None if read is None else v_BD)

    tokens = (jnp.moveaxis(x.astype(dtype), 1, 0), jnp.moveaxis(starts_BT, 1, 0))
    last, (spikes_TBD, v_TBD) = jax.lax.scan(step, v, tokens)
    spikes = jnp.moveaxis(spikes_TBD, 0, 1).astype(x.dtype)
    if read is None:
        return spikes, last
    v_BTD = jnp.moveaxis(v_TBD, 0, 1)
    return read.write(spikes), read.states_by_place(last, lambda at: outputs_at(v_BTD, v, at))


def _check(x, tau, threshold, initial_state, segment_ids) -> None:
    """Raise ValueError naming the argument that can't be right."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim != 3 or 0 in x.shape:
        reject("x", x, "floating [batch, time, neurons], every size >= 1,")
    if not tau >= 1:
        raise ValueError(f"tau: got {tau}; expected a number of tokens >= 1")
    if not threshold > 0:
        raise ValueError(f"threshold: got {threshold}; expected a number above 0")
    B, T, D = x.shape
    if initial_state is not None and (
        initial_state.shape != (B, D) or not jnp.issubdtype(initial_state.dtype, jnp.floating)
    ):
        reject("initial_state", initial_state, f"floating [{B}, {D}]")
    check_segment_ids(segment_ids, (B, T))
