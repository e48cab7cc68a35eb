"""A layer with fewer experts, or with those of several checkpoints."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..kernels.common.arguments import accumulator

AXES = {"router": -1, "experts": 0}  # of experts, in the params of a layer


def prune_experts(
    params: Any, load: Float[Array, "e"], keep: int
) -> tuple[dict[str, Any], Int[Array, "keep"]]:
    """Keep the experts that are used the most, in their order.

    Args:
      params: of a `frugax.layers.MoE`. Layers that are stacked, as under a scan, go through `jax.vmap`.
      load: how much each expert is used, such as the mean of `RoutingStatistics.load` over a data set.
      keep: how many experts stay; the router's k must not be more.

    Returns:
      The params of a layer with `keep` experts, and which experts these are, int32. A bias that balances
      loads is `bias[kept]` from now on.

    Raises:
      ValueError: keep is not between 1 and E, or load is not [E].

    Source: Kim et al. 2021, Scalable and efficient MoE training for multitask multilingual models (arXiv
    2109.10465), pruning by utilization.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.MoE(experts=4, k=1), jnp.ones((1, 3, 8))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> small, kept = frugax.moe.prune_experts(params, jnp.array([0.1, 0.4, 0.2, 0.3]), 2)
        >>> kept.tolist(), layer.clone(experts=2).apply({"params": small}, x).shape
        ([1, 3], (1, 3, 8))
    """
    E = _experts(params)
    if load.shape != (E,):
        raise ValueError(f"load: got {list(load.shape)}; expected [{E}], one for each expert")
    if not 1 <= keep <= E:
        raise ValueError(f"keep: got {keep}; expected 1 to {E}, the number of experts")
    kept = jnp.sort(jax.lax.top_k(load, keep)[1]).astype(jnp.int32)
    return {
        name: tree if name == "shared" else jax.tree.map(lambda x, a=AXES[name]: jnp.take(x, kept, a), tree)
        for name, tree in params.items()
    }, kept


def aggregate_experts(checkpoints: Sequence[Any]) -> dict[str, Any]:
    """Make one layer of the experts of several, with their routers side by side.

    A softmax over all the logits then weighs the checkpoints' experts against each other.

    Args:
      checkpoints: params of `frugax.layers.MoE`, of the same width and the same kind of expert; they may have
        different numbers of experts. Layers that are stacked, as under a scan, go through `jax.vmap`.

    Returns:
      The params of a layer with the experts of all, in the order of the checkpoints. Shared experts are
      averaged. For the params of a whole model, take these for its layers of experts and a mean for the rest.

    Raises:
      ValueError: there are no checkpoints, they differ in more than the number of experts, or shared experts
        are packed.

    Source: Kim et al. 2021 (arXiv 2109.10465), aggregation of experts.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.MoE(experts=4, k=1), jnp.ones((1, 3, 8))
        >>> first, second = (layer.init(jax.random.key(i), x)["params"] for i in range(2))
        >>> large = frugax.moe.aggregate_experts([first, second])
        >>> layer.clone(experts=8).apply({"params": large}, x).shape
        (1, 3, 8)
    """
    if not checkpoints:
        raise ValueError("checkpoints: got none; expected the params of one or more layers")
    first = checkpoints[0]
    for i, params in enumerate(checkpoints):
        _experts(params)
        if _all_but_experts(params) != _all_but_experts(first):
            raise ValueError(
                f"checkpoints: {i} differs from 0; expected equal shapes, but for the number of experts"
            )
    join: dict[str, Callable[..., Array]] = {"shared": _mean}
    join |= {name: functools.partial(_concatenated, axis=axis) for name, axis in AXES.items()}
    return {name: jax.tree.map(join[name], *(p[name] for p in checkpoints)) for name in first}


def _concatenated(*arrays: Array, axis: int) -> Array:
    return jnp.concatenate(arrays, axis)


def _mean(*arrays: Array) -> Array:
    if not jnp.issubdtype(arrays[0].dtype, jnp.floating):
        raise ValueError(f"shared: got {arrays[0].dtype}, of packed weights; expected floats, to average")
    wide = jnp.stack(arrays).astype(accumulator(arrays[0].dtype))
    return jnp.mean(wide, 0).astype(arrays[0].dtype)


def _experts(params: Any) -> int:
    """E; ValueError where params are not of E experts and of a router with a column for each."""
    names = sorted(params) if isinstance(params, dict) else [type(params).__name__]
    if "experts" not in names or not set(names) <= {"router", "experts", "shared"}:
        raise ValueError(f"params: got {', '.join(names)}; expected those of a MoE: router, experts, shared")
    found = {x.shape[0] for x in jax.tree.leaves(params["experts"])}
    E = max(found)
    if len(found) > 1 or any(x.shape[-1:] != (E,) for x in jax.tree.leaves(params.get("router", {}))):
        got = [list(x.shape) for x in jax.tree.leaves(params)]
        raise ValueError(f"params: got {got}; expected experts [E, ...] and a router [..., E]")
    return E


def _all_but_experts(params: dict[str, Any]) -> Any:
    """The tree, and every array's shape without the axis of experts and its dtype."""
    others = {"router": slice(None, -1), "experts": slice(1, None), "shared": slice(None)}
    kept = [
        (x.shape[others[name]], x.dtype) for name in sorted(params) for x in jax.tree.leaves(params[name])
    ]
    return jax.tree.structure(params), kept
