"""SlimFit's schedule: of stacked layers, only those that the last updates moved most are trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.matrix_spec import STACKED, MatrixSpec


class SlimFitState(NamedTuple):
    """For each stacked leaf how far its layers last moved [layers]; inner's states, theirs [layers, ...]."""

    distance: dict[str, Array]
    stacked: dict[str, Any]
    rest: Any


def slimfit(
    inner: optax.GradientTransformation, freeze_rate: Any, *, layers: str = r"(^|/)layers/"
) -> optax.GradientTransformation:
    """Freeze the share of layers with the smallest last |update| / |W|; the others go through `inner`.

    A layer is a slice of axis 0 of a leaf that `layers` finds. Frozen ones keep weights and moments, bit for
    bit, and the distance they had: as the others slow down, their turn comes. All start at an infinite
    distance, so each trains once before any trains twice. Leaves that `layers` doesn't find always train.
    This is the schedule alone: under `jit` the frozen layers' activations are computed and kept as ever.

    State: inner's, one for each layer, and 4 bytes a layer of each stacked leaf.

    Args:
      inner: an optimizer, learning rate included, such as `optax.adamw(1e-4)`. It sees a layer at a time.
      freeze_rate: share of the layers that is frozen, 0 to 1; may be traced.
      layers: regex of the paths of stacked leaves.

    Returns:
      A transformation; its update needs the params.

    Raises:
      ValueError: `layers` finds nothing.

    Source: Ardakani et al. 2023 (arXiv 2305.18513); the ties at the start are broken by the layers' order.

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> optimizer = frugax.optim.slimfit(optax.sgd(0.1), freeze_rate=0.5)
        >>> params = {"layers": {"w": jnp.ones((4, 2))}}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> updates["layers"]["w"][:, 0].round(1).tolist() == [-0.10000000149011612] * 2 + [0.0] * 2
        True
    """
    spec = MatrixSpec(rules={layers: STACKED}, names="(?!)")

    def split(tree: Any) -> tuple[dict[str, Any], list[Any], Any, list[bool]]:
        leaves, structure = _flat(tree)
        decisions = spec.decisions(tree)
        is_stacked = [decision.view is not None for decision in decisions]
        pairs = zip(decisions, leaves, strict=True)
        stacked = {decision.path: leaf for decision, leaf in pairs if decision.view is not None}
        rest = [leaf for leaf, is_one in zip(leaves, is_stacked, strict=True) if not is_one]
        return stacked, rest, structure, is_stacked

    def init(params: Any) -> SlimFitState:
        stacked, rest, _, _ = split(params)
        distance = {path: jnp.full(len(leaf), jnp.inf) for path, leaf in stacked.items()}
        return SlimFitState(
            distance, {p: jax.vmap(inner.init)(x) for p, x in stacked.items()}, inner.init(rest)
        )

    def update(updates: Any, state: SlimFitState, params: Any = None) -> tuple[Any, SlimFitState]:
        if params is None:
            raise ValueError("params: got None; expected the params: layers move relative to them")
        stacked, rest, structure, is_stacked = split(updates)
        weights, rest_weights, _, _ = split(params)
        new_rest, rest_state = inner.update(rest, state.rest, rest_weights)

        every = jnp.concatenate([state.distance[path] for path in stacked])
        trained = jnp.round((1 - freeze_rate) * every.size).astype(jnp.int32)
        order = jnp.argsort(-every, stable=True)
        active = jnp.zeros(every.size, bool).at[order].set(jnp.arange(every.size) < trained)
        new, distance, states, start = {}, {}, {}, 0
        for path, g in stacked.items():
            here = active[start : start + len(g)]
            start += len(g)
            u, after = jax.vmap(inner.update)(g, state.stacked[path], weights[path])
            new[path] = _choose(here, u, jnp.zeros_like(u))
            states[path] = jax.tree.map(
                lambda a, b, here=here: _choose(here, a, b), after, state.stacked[path]
            )
            moved = _norms(u) / jnp.maximum(_norms(weights[path]), jnp.finfo(jnp.float32).tiny)
            distance[path] = jnp.where(here, moved, state.distance[path])
        of_stacked, of_rest = iter(new.values()), iter(new_rest)
        leaves = [next(of_stacked if is_one else of_rest) for is_one in is_stacked]
        return jax.tree.unflatten(structure, leaves), SlimFitState(distance, states, rest_state)

    return optax.GradientTransformation(init, update)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


def _choose(active: Array, new: Array, old: Array) -> Array:
    return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _norms(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=tuple(range(1, x.ndim))))
