"""Experts one after another over the queues of their tokens, with the weights of two at hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .dispatch import combine, dispatch
from .routing import Routing


def expert_by_expert(
    expert: Callable[[Any, Array], Array],
    params: Any,
    x: Float[Array, "t d"],
    routing: Routing,
    *,
    tile: int = 128,
) -> Float[Array, "t f"]:
    """Apply each expert that has tokens to all of them, and load the next one's weights meanwhile.

    For inference where weights lie in slower memory: each expert in use is loaded once, and besides tokens a
    step holds the weights of two. It has no reverse gradient: the number of steps depends on the tokens.

    Args:
      expert: from one expert's params and rows [tile, D] to rows [tile, F]; each row by itself.
      params: stacked on a leading axis, or a function from an expert's index to its params.
      x: tokens.
      routing: from a router.
      tile: rows that an expert is applied to at a time.

    Returns:
      The sum over each token's experts, weight times output, as `combine` gives it, in the experts' dtype.

    Raises:
      ValueError: tile is below 1, or params are of another number of experts.

    Source: Liang et al. 2022, M3ViT (arXiv 2210.14793), its computation reordering with double buffers.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.softmax_top_k(jnp.array([[1.0, 0.0], [0.0, 1.0]]), 1)
        >>> weights = jnp.array([[[10.0]], [[100.0]]])
        >>> times = lambda w, rows: rows @ w
        >>> frugax.moe.expert_by_expert(times, weights, jnp.array([[1.0], [2.0]]), routing).tolist()
        [[10.0], [200.0]]
    """
    if tile < 1:
        raise ValueError(f"tile: got {tile}; expected a number of rows >= 1")
    E = routing.experts
    load = params if callable(params) else _loader(params, E)
    rows, plan = dispatch(x, routing)
    tile = min(tile, len(rows))
    rows = jnp.pad(rows, ((0, tile), (0, 0)))  # the last tile may begin anywhere
    sizes = plan.group_sizes
    starts = jnp.cumsum(sizes) - sizes
    used = jnp.sum(sizes > 0)
    order = jnp.argsort(sizes == 0, stable=True)  # experts with tokens first

    def step(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        y, weights = carry
        following = lax.cond(i + 1 < used, lambda: load(order[jnp.minimum(i + 1, E - 1)]), lambda: weights)
        e = order[i]

        def apply(t: Array, y: Array) -> Array:
            at = starts[e] + t * tile
            out = expert(weights, lax.dynamic_slice_in_dim(rows, at, tile))
            # What a tile writes past its expert's rows, a later expert writes over, or nobody reads.
            return lax.dynamic_update_slice_in_dim(y, out, at, 0)

        return lax.fori_loop(0, -(-sizes[e] // tile), apply, y), following

    weights = load(order[0])
    out = jax.eval_shape(expert, weights, rows[:tile])
    y = jnp.zeros((len(rows), *out.shape[1:]), out.dtype)
    y, _ = lax.fori_loop(0, used, step, (y, weights))
    return combine(y[: len(rows) - tile], plan)


def _loader(params: Any, experts: int) -> Callable[[Array], Any]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.ndim < 1 or leaf.shape[0] != experts:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"params{name}: got {list(leaf.shape)}; expected [{experts} experts, ...]")
    return lambda e: jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, e, keepdims=False), params)
