"""Auxiliary losses of routers, unscaled."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from .routing import masked_mean


def load_balance(
    probabilities: Float[Array, "t e"],
    indices: Int[Array, "t k"],
    mask: Bool[Array, "t"] | None = None,
    *,
    axis_name: str | tuple[str, ...] = (),
) -> Float[Array, ""]:
    """E sum_e f_e P_e: f_e the share of assignments that expert e has, P_e its mean probability; 1 is even.

    Args:
      probabilities: of each token's experts.
      indices: the experts that were chosen.
      mask: tokens that count; None: all.
      axis_name: inside `jax.shard_map`, mesh axes that split tokens: shares and means are then of all
        tokens, which the mean of each device's loss is not.

    Source: Fedus et al. 2021, Switch Transformers (arXiv 2101.03961), equation 4; for k > 1 as in
    transformers' Mixtral, over k.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> p = jnp.array([[0.75, 0.25], [0.75, 0.25]])
        >>> chosen = jnp.array([[[0], [0]], [[0], [1]]])
        >>> [float(frugax.moe.load_balance(p, indices)) for indices in chosen]
        [1.5, 1.0]
    """
    E = probabilities.shape[-1]
    chosen = jnp.sum(jax.nn.one_hot(indices, E), 1) / indices.shape[1]
    share = jax.lax.stop_gradient(masked_mean(chosen, mask, axis_name))
    return E * jnp.sum(share * masked_mean(probabilities, mask, axis_name))


def z_loss(
    logits: Float[Array, "t e"],
    mask: Bool[Array, "t"] | None = None,
    *,
    axis_name: str | tuple[str, ...] = (),
) -> Float[Array, ""]:
    """The mean of logsumexp(logits)^2, which keeps logits small; `axis_name` as in `load_balance`.

    Source: Zoph et al. 2022, ST-MoE (arXiv 2202.08906), equation 5.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> round(float(frugax.moe.z_loss(jnp.zeros((3, 2)))), 4)  # log(2)^2
        0.4805
    """
    return masked_mean(jax.nn.logsumexp(logits.astype(jnp.float32), -1) ** 2, mask, axis_name)


def squared_variation(x: Float[Array, "e"]) -> Float[Array, ""]:
    """The squared coefficient of variation, (std / mean)^2, of importance or load.

    Source: Shazeer et al. 2017, the sparsely-gated mixture of experts (arXiv 1701.06538), equation 7.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> float(frugax.moe.squared_variation(jnp.array([1.0, 3.0])))
        0.25
    """
    return jnp.var(x) / (jnp.mean(x) ** 2 + 1e-10)


def activation_locality(
    logits: Float[Array, "t e"], follows: Bool[Array, "t"], *, steepness: float = 100.0
) -> Float[Array, ""]:
    """Cross entropy between the activations of neighbouring tokens: low where they use the same experts.

    Args:
      logits: before the ReLU.
      follows: tokens whose predecessor is that of the same document.
      steepness: sigmoid(steepness * logit) stands for the step at 0.

    Source: Song et al. 2025, BlockFFN (arXiv 2507.08771); a token's predecessor is the prediction, the token
    the target, as in its code.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> logits = jnp.array([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
        >>> same, other = jnp.array([False, True, False]), jnp.array([False, False, True])
        >>> [round(float(frugax.moe.activation_locality(logits, f)), 3) for f in (same, other)]
        [0.0, 100.0]
    """
    scaled = steepness * logits.astype(jnp.float32)
    before, target = scaled[:-1], jax.nn.sigmoid(scaled[1:])
    entropy = jax.nn.softplus(before) - before * target
    return masked_mean(jnp.mean(entropy, -1), follows[1:])


def chunk_sparsity(
    activations: Float[Array, "t e"],
    mask: Bool[Array, "t"] | None = None,
    *,
    chunk: int = 8,
    starts: Bool[Array, "t"] | None = None,
) -> Float[Array, ""]:
    """Mean over chunks and experts of 1 - prod_t (1 - p_t): how likely any token of a chunk uses an expert.

    Args:
      activations: non-negative; p is each over the sum of its token's.
      mask: tokens that count; None: all. A chunk without such tokens is none.
      chunk: tokens that are decoded together. The last chunk of a document may have fewer.
      starts: tokens that start a document, and with it a chunk; None: the first alone.

    Source: Song et al. 2025, BlockFFN (arXiv 2507.08771).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> half = jnp.full((2, 2), 0.5)
        >>> round(float(frugax.moe.chunk_sparsity(half, chunk=2)), 3)  # 1 - 1/2 * 1/2
        0.75
    """
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}; expected a number of tokens >= 1")
    T = activations.shape[0]
    p = activations / (jnp.sum(activations, -1, keepdims=True) + 1e-5)
    real = jnp.ones(T, bool) if mask is None else mask
    p = jnp.where(real[:, None], p, 0.0)
    place = jnp.arange(T)
    if starts is not None:
        place = place - jax.lax.cummax(jnp.where(starts, place, 0))
    of = jnp.cumsum(place % chunk == 0) - 1  # each token's chunk
    unused = jnp.exp(jax.ops.segment_sum(jnp.log1p(1e-5 - p), of, T))
    used = jax.ops.segment_max(real.astype(jnp.int32), of, T) > 0
    return 1 - masked_mean(jnp.mean(unused, -1), used)
