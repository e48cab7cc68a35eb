"""Routers: scores of a token's experts, a choice by them, and weights. Each is a function of logits.

Every router takes `mask`, the tokens that count (padding has weight 0 and no share in losses), and returns a
`Routing`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from .losses import load_balance, squared_variation, z_loss
from .routing import Mask, Routing, check_logits, routing, tokens_an_expert
from .selection import auction, sinkhorn, top_k, top_k_of_groups


def softmax_top_k(
    logits: Float[Array, "t e"],
    k: int,
    *,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int | None = None,
    top_groups: int = 1,
    mask: Mask = None,
) -> Routing:
    """Choose the k likeliest experts, weighted by their probabilities.

    Args:
      logits: of each token's experts.
      k: experts a token.
      normalize: whether the chosen ones' weights sum to 1, as in Mixtral, or are probabilities among all, as
        in Switch Transformers and OLMoE.
      scale: what weights are multiplied by, after that.
      groups, top_groups: only experts of the best groups are chosen from (`selection.within_groups`).
      mask: tokens that count; None: all.

    Returns:
      A `Routing` with the losses "load_balance" and "z".

    Raises:
      ValueError: k is not between 1 and the number of experts (of the best groups), or groups don't divide
        them.

    Source: Fedus et al. 2021 (arXiv 2101.03961); Jiang et al. 2024, Mixtral (2401.04088); DeepSeek-V2
    (2405.04434) for groups.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.softmax_top_k(jnp.array([[2.0, 0.0, 1.0]]), 2)
        >>> routing.indices.tolist(), [round(w, 3) for w in routing.weights[0].tolist()]
        ([[0, 2]], [0.731, 0.269])
    """
    check_logits(logits, mask)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), -1)
    indices = top_k_of_groups(probabilities, k, groups, top_groups, 1)
    weights = _weights(probabilities, indices, normalize) * scale
    losses = {"load_balance": load_balance(probabilities, indices, mask), "z": z_loss(logits, mask)}
    return routing(indices, weights, probabilities, losses, mask=mask)


def sigmoid_top_k(
    logits: Float[Array, "t e"],
    k: int,
    *,
    bias: Float[Array, "e"] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    groups: int | None = None,
    top_groups: int = 1,
    mask: Mask = None,
) -> Routing:
    """Choose by sigmoid scores plus a bias that balances loads; weights are scores without it.

    Args:
      logits: of each token's experts.
      k: experts a token.
      bias: added for the choice alone, from `updated_bias`; None: zeros.
      normalize, scale, groups, top_groups, mask: as in `softmax_top_k`; a group counts as its two best.

    Returns:
      A `Routing` with the loss "load_balance" of the normalized scores, which DeepSeek-V3 takes with a tiny
      factor.

    Raises:
      ValueError: as `softmax_top_k`, or bias is not [E].

    Source: Wang et al. 2024, loss-free balancing (arXiv 2408.15664); DeepSeek-V3 (arXiv 2412.19437).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> logits = jnp.array([[0.0, 1.0, -1.0]])
        >>> frugax.moe.sigmoid_top_k(logits, 1, bias=jnp.array([0.5, 0.0, 0.0])).indices.tolist()
        [[0]]
    """
    check_logits(logits, mask)
    scores = jax.nn.sigmoid(_whole_rows(logits.astype(jnp.float32)))
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"bias: got {list(bias.shape)}; expected [{logits.shape[1]}], one for each expert")
    choose_by = scores if bias is None else scores + jax.lax.stop_gradient(bias)[None]
    indices = top_k_of_groups(choose_by, k, groups, top_groups, 2)
    weights = _weights(scores, indices, normalize) * scale
    shares = scores / jnp.sum(scores, -1, keepdims=True)
    return routing(indices, weights, shares, {"load_balance": load_balance(shares, indices, mask)}, mask=mask)


def updated_bias(bias: Float[Array, "e"], load: Float[Array, "e"], rate: float = 1e-3) -> Float[Array, "e"]:
    """Raise the bias of experts with less than the mean load by `rate`, and lower the others'.

    Source: Wang et al. 2024, loss-free balancing (arXiv 2408.15664), algorithm 1.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.moe.updated_bias(jnp.zeros(2), jnp.array([0.8, 0.2]), 0.5).tolist()
        [-0.5, 0.5]
    """
    return bias + (rate * jnp.sign(jnp.mean(load) - load)).astype(bias.dtype)


def noisy_top_k(
    logits: Float[Array, "t e"],
    k: int,
    *,
    noise_logits: Float[Array, "t e"] | None = None,
    key: Key[Array, ""] | None = None,
    noise: Float[Array, "t e"] | None = None,
    mask: Mask = None,
) -> Routing:
    """Choose by logits with normal noise of a learned size; weights are the softmax over the chosen ones.

    Args:
      logits: of each token's experts.
      k: experts a token.
      noise_logits: softplus of them is the noise's standard deviation.
      key: of the noise.
      noise: standard normal numbers instead of a key. Without either none is added, as in evaluation.
      mask: as in `softmax_top_k`.

    Returns:
      A `Routing` with the losses "importance" and "load", squared coefficients of variation. The load is the
      probability that an expert would be chosen if its noise were drawn again, where there is noise, else
      the importance stands in for it.

    Raises:
      ValueError: as `softmax_top_k`; a key or noise comes without noise_logits, or both come.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), appendix A; Fan et al. 2022, M3ViT (arXiv 2210.14793).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.0, 1.0]])
        >>> frugax.moe.noisy_top_k(logits, 2, noise_logits=logits, key=jax.random.key(0)).indices.shape
        (1, 2)
    """
    check_logits(logits, mask)
    clean = logits.astype(jnp.float32)
    drawn = key is not None or noise is not None
    if drawn and (noise_logits is None or noise_logits.shape != logits.shape):
        got = "None" if noise_logits is None else list(noise_logits.shape)
        what = "a key" if noise is None else "noise"
        raise ValueError(f"noise_logits: got {got} with {what}; expected the noise's size {[*logits.shape]}")
    if noise is not None and (key is not None or noise.shape != logits.shape):
        got = f"{list(noise.shape)}{' and a key' * (key is not None)}"
        raise ValueError(f"noise: got {got}; expected {[*logits.shape]}, or a key alone")
    noisy = clean
    if drawn:
        noise = jax.random.normal(key, clean.shape) if noise is None else noise
        deviation = jax.nn.softplus(noise_logits.astype(jnp.float32)) + 1e-2
        noisy = clean + deviation * noise
    indices = top_k(noisy, k)
    chosen = jax.nn.softmax(jnp.take_along_axis(noisy, indices, 1), -1)
    gates = _spread(chosen, indices, clean.shape[1], mask)
    importance = jnp.sum(gates, 0)
    load = importance
    if drawn and k < clean.shape[1]:
        # An expert is chosen again if it passes the k-th best of the others.
        best = jax.lax.top_k(noisy, k + 1)[0]
        inside = noisy > best[:, k:]
        threshold = jnp.where(inside, best[:, k:], best[:, k - 1 : k])
        real = 1.0 if mask is None else mask[:, None].astype(jnp.float32)
        load = jnp.sum(jax.scipy.stats.norm.cdf((clean - threshold) / deviation) * real, 0)
    losses = {"importance": squared_variation(importance), "load": squared_variation(load)}
    return routing(indices, chosen, jax.nn.softmax(clean, -1), losses, mask=mask)


def expert_choice(logits: Float[Array, "t e"], *, capacity: int | float = 1.0, mask: Mask = None) -> Routing:
    """Let every expert choose its tokens, the same number each, by the softmax over experts.

    Args:
      logits: of each token's experts.
      capacity: tokens of an expert: a number, or as a float a factor of T / E, rounded up. It can't look at
        later tokens in a causal model's evaluation.
      mask: tokens that count; an expert that is left with too few takes masked ones with weight 0.

    Returns:
      A `Routing` by experts, without losses: loads are even.

    Raises:
      ValueError: capacity is not between 1 and the number of tokens.

    Source: Zhou et al. 2022 (arXiv 2202.09368).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> logits = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        >>> frugax.moe.expert_choice(logits, capacity=1).indices.tolist()
        [[0], [2]]
    """
    check_logits(logits, mask)
    T, E = logits.shape
    count = tokens_an_expert(capacity, T / E, most=T)
    scores = jax.nn.softmax(logits.astype(jnp.float32), -1)
    seen = scores if mask is None else jnp.where(mask[:, None], scores, -1.0)
    tokens = top_k(seen.T, count)
    weights = jnp.take_along_axis(scores.T, tokens, 1)
    return routing(tokens, weights, scores, {}, mask=mask, by="expert")


def sinkhorn_top_k(
    logits: Float[Array, "t e"], k: int = 1, *, train: bool = True, mask: Mask = None
) -> Routing:
    """Choose by a balanced plan; weights are those of the logits, sigmoid for one expert, else softmax.

    Args:
      logits: of each token's experts.
      k: experts a token.
      train: False takes each token's best experts, which no other token decides.
      mask: as in `softmax_top_k`.

    Returns:
      A `Routing` without losses.

    Raises:
      ValueError: as `softmax_top_k`.

    Source: Clark et al. 2022 (arXiv 2202.01169); weights as in Megatron-LM.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.moe.sinkhorn_top_k(jnp.array([[2.0, 0.0], [1.0, 0.0]])).indices.tolist()
        [[0], [1]]
    """
    check_logits(logits, mask)
    logits = _whole_rows(logits.astype(jnp.float32))
    lost = jnp.isnan(logits) if mask is None else jnp.isnan(logits) | ~mask[:, None]
    real = jnp.where(lost, 0.0, logits)
    indices = top_k(sinkhorn(jax.lax.stop_gradient(real)) if train else real, k)
    scores = jax.nn.sigmoid(logits) if k == 1 else jax.nn.softmax(logits, -1)
    return routing(indices, _weights(scores, indices, False), jax.nn.softmax(logits, -1), {}, mask=mask)


def base(logits: Float[Array, "t e"], *, train: bool = True, mask: Mask = None) -> Routing:
    """Give every expert the same number of tokens by an auction; one expert a token, weighted by sigmoid.

    Args:
      logits: of each token's experts; E divides T.
      train: False takes each token's best expert, as the paper does where tokens come one by one.
      mask: tokens that count: masked ones take part in the auction, with weight 0.

    Returns:
      A `Routing` without losses.

    Raises:
      ValueError: E does not divide T.

    Source: Lewis et al. 2021, BASE layers (arXiv 2103.16716).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.moe.base(jnp.array([[3.0, 0.0], [2.0, 1.9]])).indices.tolist()
        [[0], [1]]
    """
    check_logits(logits, mask)
    logits = _whole_rows(logits.astype(jnp.float32))
    real = jnp.where(jnp.isnan(logits), 0.0, logits)
    indices = auction(real)[:, None] if train else top_k(real, 1)
    weights = jnp.take_along_axis(jax.nn.sigmoid(logits), indices, 1)
    return routing(indices, weights, jax.nn.softmax(logits, -1), {}, mask=mask)


def relu_route(
    logits: Float[Array, "t e"],
    *,
    gain: Float[Array, "e"] | float = 1.0,
    epsilon: float = 1e-6,
    mask: Mask = None,
) -> Routing:
    """Activate as many experts as have positive logits, weighted by RMSNorm(ReLU(logits)).

    The losses that make it sparse are functions of the logits: `activation_locality`, and
    `chunk_sparsity(jax.nn.relu(logits))`.

    Args:
      logits: of each token's experts.
      gain: of the norm, learned.
      epsilon: of the norm.
      mask: as in `softmax_top_k`.

    Returns:
      A `Routing` of all E experts in order; most weights are 0.

    Source: Song et al. 2025, BlockFFN (arXiv 2507.08771).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.relu_route(jnp.array([[3.0, -1.0, 0.0, 4.0]]))
        >>> [round(w, 2) for w in routing.weights[0].tolist()]
        [1.2, 0.0, 0.0, 1.6]
    """
    check_logits(logits, mask)
    T, E = logits.shape
    if jnp.shape(gain) not in ((), (E,)):
        raise ValueError(f"gain: got {list(jnp.shape(gain))}; expected a number or [{E}], one an expert")
    active = jax.nn.relu(logits.astype(jnp.float32))
    weights = active * jax.lax.rsqrt(jnp.mean(active**2, -1, keepdims=True) + epsilon)
    weights = weights * (gain if jnp.ndim(gain) == 0 else jnp.asarray(gain)[None])
    shares = active / (jnp.sum(active, -1, keepdims=True) + 1e-5)
    indices = jnp.broadcast_to(jnp.arange(E), (T, E))
    return routing(indices, weights, shares, {}, mask=mask)


ROUTERS: dict[str, Any] = {
    f.__name__: f
    for f in (softmax_top_k, sigmoid_top_k, noisy_top_k, expert_choice, sinkhorn_top_k, base, relu_route)
}


def route(logits: Float[Array, "t e"], router: str | Any = "softmax_top_k", **options: Any) -> Routing:
    """Route tokens by the router of a name, or by a function of logits.

    Args:
      logits: of each token's experts [T, E].
      router: "softmax_top_k", "sigmoid_top_k", "noisy_top_k", "expert_choice", "sinkhorn_top_k", "base",
        "relu_route", or a function `router(logits, **options)`.
      options: what the router takes: k=2, mask=..., key=... .

    Returns:
      Its `Routing`.

    Raises:
      ValueError: there is no such router, or an option can't be right.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.moe.route(jnp.zeros((5, 4)), "softmax_top_k", k=2).weights.shape
        (5, 2)
    """
    if isinstance(router, str):
        if router not in ROUTERS:
            raise ValueError(f"router: got {router!r}; expected one of {', '.join(ROUTERS)}")
        router = ROUTERS[router]
    return functools.partial(router, logits)(**options)


def _whole_rows(logits: Array) -> Array:
    """Make a token's logits NaN if one of them is, so that its weight says so whichever expert it gets."""
    return jnp.where(jnp.isnan(logits).any(-1, keepdims=True), jnp.nan, logits)


def _weights(scores: Array, indices: Array, normalize: bool) -> Array:
    weights = jnp.take_along_axis(scores, indices, 1)
    return weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20) if normalize else weights


def _spread(weights: Array, indices: Array, experts: int, mask: Mask) -> Array:
    """Weights [T, k] in the place of each expert, [T, E]."""
    if mask is not None:
        weights = jnp.where(mask[:, None], weights, 0.0)
    rows = jnp.arange(weights.shape[0])[:, None]
    return jnp.zeros((weights.shape[0], experts), weights.dtype).at[rows, indices].set(weights)
