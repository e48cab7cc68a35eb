"""A dense feed-forward layer cut into experts by which neurons the domains of its data activate."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from .routing import masked_mean
from .upcycling import check_feed_forward

Subsets = Bool[np.ndarray, "e h"] | Bool[Array, "e h"]


def split_by_activation(
    params: Any, activity: Float[Array, "e h"] | Float[np.ndarray, "e h"], keep: float
) -> tuple[dict[str, Any], Bool[np.ndarray, "e h"]]:
    """Give each domain an expert of the neurons that its tokens activate most.

    Args:
      params: of a `frugax.layers.GLU` or `MLP` with H hidden neurons.
      activity: the mean of |activation| of each neuron over the tokens of each of E domains: the `mean_abs`
        that `frugax.quant.calibrate` finds for the matrix "out", domain by domain.
      keep: the share of neurons in an expert, the shared ones among them; the authors' is 0.5.

    Returns:
      params of experts, as those of `split_neurons`, and the subsets [E, H] of neurons, bool.

    Raises:
      ValueError: an argument can't be right.

    Source: Cai et al. 2024, Read-ME (arXiv 2410.19123), with its code: neurons in every subset are shared.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.MLP(expand=2, activation="relu"), jnp.ones((1, 3, 8))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> activity = jax.random.uniform(jax.random.key(1), (2, 16))
        >>> split, subsets = frugax.moe.split_by_activation(params, activity, 0.5)
        >>> subsets.sum(1).tolist(), sorted(split)
        ([8, 8], ['experts', 'shared'])
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep}; expected a share above 0 and at most 1")
    values = np.asarray(activity, np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"activity: got {list(values.shape)}; expected finite numbers [domains, neurons]")
    count = max(1, int(keep * values.shape[1]))
    subsets = np.zeros(values.shape, bool)
    np.put_along_axis(subsets, np.argsort(-values, 1, kind="stable")[:, :count], True, 1)
    return split_neurons(params, subsets), subsets


def split_neurons(params: Any, subsets: Subsets) -> dict[str, Any]:
    """Cut a dense feed-forward layer into experts of subsets of its neurons.

    Neurons in every subset make the shared expert, so each expert with the shared one is the dense layer with
    its subset's neurons alone. Where subsets are disjoint and cover all neurons, the sum of all experts is
    the dense layer. Sizes follow from the subsets' values: not under `jax.jit`.

    Args:
      params: of a `frugax.layers.GLU` or `MLP` with H hidden neurons.
      subsets: which neurons each of E experts has.

    Returns:
      "experts" and, where neurons are in every subset of several, "shared": params of a `frugax.layers.MoE`
      with weights of 1 from outside, `routing=`; it needs no router. Widths are padded with neurons that are
      zero to a multiple of 8, and those of experts to the largest.

    Raises:
      ValueError: an argument can't be right.

    Source: Cai et al. 2024, Read-ME (arXiv 2410.19123).

    Example:
        >>> import frugax, jax, jax.numpy as jnp, numpy as np
        >>> layer, x = frugax.layers.GLU(expand=2), jnp.ones((1, 3, 8))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> halves = np.arange(16) % 2 == np.arange(2)[:, None]
        >>> frugax.moe.split_neurons(params, halves)["experts"]["out"]["kernel"].shape
        (2, 8, 8)
    """
    entry = check_feed_forward(params)
    H = params["out"]["kernel"].shape[0]
    chosen = np.asarray(subsets)
    if chosen.dtype != bool or chosen.ndim != 2 or chosen.shape[1] != H or not chosen.any(1).all():
        got = f"{chosen.dtype}{list(chosen.shape)}"
        raise ValueError(f"subsets: got {got}; expected bool [experts, {H}] with a neuron for each expert")
    common = chosen.all(0) if len(chosen) > 1 else np.zeros(H, bool)
    own = [np.flatnonzero(row & ~common) for row in chosen]
    width = _padded(max(1, *map(len, own)))
    stacked = [_neurons(params, entry, neurons, width) for neurons in own]
    made = {"experts": jax.tree.map(lambda *x: np.stack(x), *stacked)}
    if common.any():
        made["shared"] = _neurons(params, entry, np.flatnonzero(common), _padded(int(common.sum())))
    return jax.tree.map(jnp.asarray, made)


def activation_overlap(
    activations: Float[Array, "... h"],
    subsets: Subsets,
    *,
    levels: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
) -> Float[Array, "... e"]:
    """Measure how many of each token's strongest neurons an expert has of its own.

    An expert's own neurons are those that not every expert has; N is how many the first one has. For each
    level, a token's strongest neurons are level * N, and the result is the mean over levels of how many of
    them are the expert's own, over N. `router_distillation` makes labels of it.

    Args:
      activations: of each token's neurons, the inputs of the matrix "out" in the dense model.
      subsets: which neurons each of E experts has; shared ones among them or not.
      levels: of the number of neurons of an expert.

    Raises:
      ValueError: subsets have other neurons than activations, or the first has none of its own.

    Source: the code of Cai et al. 2024, Read-ME (arXiv 2410.19123), which compares signed activations.

    Example:
        >>> import frugax, jax.numpy as jnp, numpy as np
        >>> subsets = np.array([[True, True, False, False], [False, False, True, True]])
        >>> activations = jnp.array([[3.0, 1.0, 2.0, 0.0]])
        >>> frugax.moe.activation_overlap(activations, subsets, levels=(0.5, 1.0)).tolist()
        [[0.5, 0.25]]
    """
    chosen = np.asarray(subsets, bool)
    if chosen.ndim != 2 or activations.shape[-1] != chosen.shape[1]:
        got = f"{list(chosen.shape)} for activations {list(activations.shape)}"
        raise ValueError(f"subsets: got {got}; expected [experts, neurons]")
    own = chosen & ~(chosen.all(0) & (len(chosen) > 1))
    size = int(own[0].sum())
    if size < 1:
        raise ValueError("subsets: got a first expert without neurons of its own; expected one at least")
    counts = [max(1, int(level * size)) for level in levels]
    if not counts or min(levels) <= 0 or max(counts) > chosen.shape[1]:
        got = f"levels: got {list(levels)} of {size} neurons"
        raise ValueError(f"{got}; expected numbers above 0 that no more than {chosen.shape[1]} neurons are")
    order = jax.lax.top_k(activations, max(counts))[1]
    held = jnp.take(jnp.asarray(own.T, jnp.float32), order, 0)  # [..., strongest, E]
    return jnp.mean(jnp.stack([jnp.sum(held[..., :n, :], -2) for n in counts]), 0) / size


def router_distillation(
    logits: Float[Array, "*t e"],
    overlap: Float[Array, "*layers_and_t e"],
    mask: Bool[Array, "*t"] | None = None,
) -> Float[Array, ""]:
    """Cross entropy of a router outside of the model with labels from the neurons that tokens activate.

    A token's target is 3/4 its expert of the largest overlap, smoothed by a half, and 1/4 a softmax of 50/3
    times its overlaps. No gradient reaches the overlaps.

    The authors train in rounds: the router by this loss for the dense model, then the model by its own loss
    with each token masked to the neurons of the router's first choice, then the router anew.

    Args:
      logits: of `frugax.layers.DecoupledRouter`, one choice for all layers.
      overlap: from `activation_overlap`, of one layer or of several in front.
      mask: tokens that count; None: all.

    Returns:
      The mean over tokens and layers, in float32.

    Raises:
      ValueError: overlap has not the shape of logits behind its layers, or mask is not of the tokens.

    Source: the code of Cai et al. 2024, Read-ME (arXiv 2410.19123), which adds layers up.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> overlap = jnp.array([[0.5, 0.25]])
        >>> right, wrong = jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 2.0]])
        >>> [round(float(frugax.moe.router_distillation(x, overlap)), 3) for x in (right, wrong)]
        [0.51, 1.744]
    """
    if overlap.ndim < logits.ndim or overlap.shape[overlap.ndim - logits.ndim :] != logits.shape:
        expected = ", ".join(map(str, logits.shape))
        raise ValueError(f"overlap: got {list(overlap.shape)}; expected [..., {expected}], as logits")
    if mask is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(f"mask: got {list(mask.shape)}; expected {[*logits.shape[:-1]]}, as logits")
    if mask is not None:  # what is left out may be anything, and has no gradient
        logits, overlap = (jnp.where(mask[..., None], x, 0) for x in (logits, overlap))
    E = logits.shape[-1]
    overlap = jax.lax.stop_gradient(overlap.astype(jnp.float32))
    label = 0.5 * jax.nn.one_hot(jnp.argmax(overlap, -1), E) + 0.5 / E
    target = 0.75 * label + 0.25 * jax.nn.softmax(50 / 3 * overlap, -1)
    entropy = -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32), -1), -1)
    of_token = jnp.mean(entropy.reshape(-1, *logits.shape[:-1]), 0).reshape(-1)
    return masked_mean(of_token, None if mask is None else mask.reshape(-1))


def _padded(width: int) -> int:
    return 8 * math.ceil(width / 8)


def _neurons(params: Any, entry: str, neurons: np.ndarray, width: int) -> dict[str, Any]:
    """The params of some neurons, with zeros up to a width."""
    free = width - len(neurons)
    # A GLU's first matrix has a gate and a value for each neuron, one half of the columns each.
    parts = np.split(np.asarray(params[entry]["kernel"]), 2 if entry == "gate_in" else 1, 1)
    into = np.concatenate([np.pad(part[:, neurons], ((0, 0), (0, free))) for part in parts], 1)
    out = np.pad(np.asarray(params["out"]["kernel"])[neurons], ((0, free), (0, 0)))
    return {entry: {"kernel": into}, "out": {"kernel": out}}
