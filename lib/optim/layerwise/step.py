"""A training step that works on the active layers of a stack alone: their weights, gradients and moments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from .active import active_value_and_grad, is_stacked, take_layers


class Layerwise(optax.GradientTransformation):
    """An optimizer of some layers at a time, for `layerwise_step`; a drop-in for `optax.adamw` besides.

    Its update also takes trees of the active layers alone, leaves [n, ...] in the place of stacked ones.

    Attributes:
      active: (state, params) -> indices of the layers that the next update moves, ascending.
      layers: regex of the paths of stacked leaves.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"layers": {"w": jnp.ones((6, 2, 3))}}
        >>> optimizer = frugax.optim.lisa(1e-3, active=2)
        >>> optimizer.active(optimizer.init(params), params).shape
        (2,)
    """

    active: Callable[[Any, Any], Int[Array, "n"]]
    layers: str

    def __new__(
        cls,
        rule: optax.GradientTransformation,
        active: Callable[[Any, Any], Array],
        layers: str,
    ):
        """Name the layers that `rule` moves."""
        made = super().__new__(cls, rule.init, rule.update)
        made.active = active
        made.layers = layers
        return made


def layerwise_step(
    optimizer: Layerwise,
    loss_fn: Callable[[Any], Array],
    params: Any,
    state: Any,
    *,
    keep: str | None = None,
) -> tuple[Any, Any, Float[Array, ""]]:
    """One step of `lisa`, `badam` or `slimfit(together=True)`, with memory for the active layers alone.

    The same step as with `jax.grad`, `optimizer.update` and `optax.apply_updates`, but frozen layers have no
    gradient, no updates, and keep no activations for them; see `active_value_and_grad`.

    Args:
      optimizer: a `Layerwise` transformation.
      loss_fn: params -> scalar, which scans over the stacked layers.
      params: donate them and `state` to the surrounding `jit`: they are updated in place.
      state: of the optimizer, made with all of the params.
      keep: how activations are kept: None or "dots", exact, or a number format such as "int8"; see
        `active_value_and_grad`.

    Returns:
      New params, new state, and the loss before the step.

    Raises:
      ValueError: the optimizer isn't layerwise; as `active_value_and_grad`.

    Source: Pan et al. 2024, LISA (arXiv 2403.17919); Luo et al. 2024, BAdam (2404.02827); Ardakani et al.
    2023, SlimFit (2305.18513).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> params = {"layers": {"w": jnp.ones((4, 3, 3)) / 3}, "x": jnp.ones(3)}
        >>> def loss(p):
        ...     return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), p["x"], p["layers"]["w"])[0].sum()
        >>> optimizer = frugax.optim.lisa(0.1, active=1)
        >>> new, state, value = frugax.optim.layerwise_step(optimizer, loss, params, optimizer.init(params))
        >>> int((new["layers"]["w"] != params["layers"]["w"]).any((1, 2)).sum())
        1
    """
    if not isinstance(optimizer, Layerwise):
        raise ValueError(
            f"optimizer: got {type(optimizer).__name__}; expected lisa, badam or slimfit(together=True), "
            "not chained with others"
        )
    active = optimizer.active(state, params)
    loss, gradient = active_value_and_grad(loss_fn, params, active, layers=optimizer.layers, keep=keep)
    leaves, tree = _flat(params)
    stacked = [i for i, is_one in enumerate(is_stacked(params, optimizer.layers)) if is_one]
    slots = list(leaves)
    for i, x in zip(stacked, take_layers(leaves, stacked, active), strict=True):
        slots[i] = x
    updates, state = optimizer.update(gradient, state, tree.unflatten(slots))
    new = jax.tree.leaves(optax.apply_updates(tree.unflatten(slots), updates))
    for i in stacked:
        new[i] = leaves[i].at[active].set(jnp.asarray(new[i]), unique_indices=True)
    return tree.unflatten(new), state, loss


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)
