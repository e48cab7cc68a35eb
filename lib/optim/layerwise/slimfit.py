"""SlimFit's schedule: of stacked layers, only those that the last updates moved most are trained."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .active import LAYERS, is_stacked
from .lisa import depth
from .step import Layerwise


class SlimFitState(NamedTuple):
    """The distances that layers last moved, inner's state for each of them, and inner's for the other leaves.

    `distance` and `stacked` are lists with an entry for each group of leaves that freeze together.
    """

    distance: list[Array]
    stacked: list[Any]
    rest: Any


def slimfit(
    inner: optax.GradientTransformation,
    freeze_rate: Any,
    *,
    layers: str = LAYERS,
    together: bool = False,
) -> optax.GradientTransformation:
    """Freeze the share of layers with the smallest last mean |dW / W|; the others go through `inner`.

    A layer is a slice of axis 0 of a leaf that `layers` finds (a weight tensor of one block), or with
    `together` that slice of all of them (a block). Frozen ones keep weights and moments, bit for bit, and the
    distance they had: as the others slow down, their turn comes. All start at an infinite distance, so each
    trains once before any trains twice. Entries W = 0 are left out of the mean; without another the distance
    stays infinite. Leaves that `layers` doesn't find always train.

    With `together`, `layerwise_step` keeps no activations for the weights of frozen blocks. For the hidden
    state's gradient it keeps products alone with `keep="dots"`, or all in few bits with "int8" or "int4";
    `frugax.optim.layerwise.compressed` has the paper's own functions for both.

    State: inner's, one for each layer, and 4 bytes for each layer of a stacked leaf (of a block).

    Args:
      inner: an optimizer, learning rate included, such as `optax.adamw(1e-4)`. It sees a layer at a time.
      freeze_rate: share of the layers that is frozen, 0 to 1; may be traced, but not with `together`, where
        at least one trains.
      layers: regex of the paths of stacked leaves.
      together: blocks freeze whole.

    Returns:
      A transformation; its update needs the params. With `together` it goes to `layerwise_step` as well.

    Raises:
      ValueError: `layers` finds nothing; stacks of several depths with `together`.

    Source: Ardakani et al. 2023 (arXiv 2305.18513) and its code, where layers are weight tensors and begin at
    random distances: here the layers' order breaks the ties at the start.

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> optimizer = frugax.optim.slimfit(optax.sgd(0.1), freeze_rate=0.5)
        >>> params = {"layers": {"w": jnp.ones((4, 2))}}
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> updates["layers"]["w"][:, 0].round(1).tolist() == [-0.10000000149011612] * 2 + [0.0] * 2
        True
    """

    def split(tree: Any) -> tuple[list[list[Array]], list[Any]]:
        """Groups of stacked leaves, and the others."""
        leaves, which = jax.tree.leaves(tree), is_stacked(tree, layers)
        stacked = [x for x, is_one in zip(leaves, which, strict=True) if is_one]
        rest = [x for x, is_one in zip(leaves, which, strict=True) if not is_one]
        return [stacked] if together else [[x] for x in stacked], rest

    def joined(groups: list[list[Array]], rest: list[Any], like: Any) -> Any:
        of_stacked, of_rest = iter([x for group in groups for x in group]), iter(rest)
        leaves = [next(of_stacked if is_one else of_rest) for is_one in is_stacked(like, layers)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def init(params: Any) -> SlimFitState:
        if together:
            depth(params, layers)
        groups, rest = split(params)
        distance = [jnp.full(len(group[0]), jnp.inf, jnp.float32) for group in groups]
        return SlimFitState(distance, [jax.vmap(inner.init)(group) for group in groups], inner.init(rest))

    def update(updates: Any, state: SlimFitState, params: Any = None) -> tuple[Any, SlimFitState]:
        if params is None:
            raise ValueError("params: got None; expected the params: layers move relative to them")
        groups, rest = split(updates)
        weights, rest_weights = split(params)
        new_rest, rest_state = inner.update(rest, state.rest, rest_weights)
        if together:
            found = [_some(inner, groups[0], weights[0], state, active(state, None))]
        else:
            every = jnp.concatenate(state.distance)
            moves = _ranked(every) < jnp.round((1 - freeze_rate) * every.size).astype(jnp.int32)
            ends = list(itertools.accumulate(map(len, state.distance)))[:-1]
            parts = jnp.split(moves, ends)
            pairs = zip(parts, groups, weights, state.distance, state.stacked, strict=True)
            found = [_masked(inner, *pair) for pair in pairs]
        new, distance, states = (list(part) for part in zip(*found, strict=True))
        return joined(new, new_rest, updates), SlimFitState(distance, states, rest_state)

    def active(state: SlimFitState, params: Any) -> Array:
        distance = state.distance[0]
        many = max(round((1 - freeze_rate) * len(distance)), 1)
        return jnp.sort(jnp.argsort(-distance, stable=True)[:many])

    rule = optax.GradientTransformation(init, update)
    return Layerwise(rule, active, layers) if together else rule


def _masked(inner: Any, moves: Array, g: Any, w: Any, distance: Array, state: Any) -> tuple[Any, Array, Any]:
    """Inner on all layers of a group, of which those that don't move stay as they are."""
    u, after = jax.vmap(inner.update)(g, state, w)
    new = [_choose(moves, x, jnp.zeros_like(x)) for x in u]
    after = jax.tree.map(lambda a, b: _choose(moves, a, b), after, state)
    return new, jnp.where(moves, _distance(u, w), distance), after


def _some(inner: Any, g: Any, w: Any, state: SlimFitState, active: Array) -> tuple[Any, Array, Any]:
    """Inner on the active layers alone; g and w have all layers or these."""
    distance, states = state.distance[0], state.stacked[0]
    whole = len(g[0]) == len(distance)
    take = lambda tree: jax.tree.map(lambda x: jnp.take(x, active, axis=0), tree)  # noqa: E731
    if whole:
        g, w = take(g), take(w)
    u, after = jax.vmap(inner.update)(g, take(states), w)
    put = lambda old, new: old.at[active].set(new, unique_indices=True)  # noqa: E731
    distance = put(distance, _distance(u, w))
    if whole:
        u = [jnp.zeros((len(distance), *x.shape[1:]), x.dtype).at[active].set(x) for x in u]
    return u, distance, jax.tree.map(put, states, after)


def _ranked(distance: Array) -> Array:
    """Each layer's place, those that moved most first."""
    order = jnp.argsort(-distance, stable=True)
    return jnp.zeros(distance.size, jnp.int32).at[order].set(jnp.arange(distance.size, dtype=jnp.int32))


def _choose(active: Array, new: Array, old: Array) -> Array:
    return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _distance(updates: Any, weights: Any) -> Array:
    """The mean of |dW / W| over the entries of each layer that aren't zero; inf where all are."""
    total = count = jnp.zeros((), jnp.float32)
    for u, w in zip(updates, weights, strict=True):
        u, w = (x.astype(jnp.float32).reshape(len(x), -1) for x in (u, w))
        total = total + jnp.sum(jnp.where(w == 0, 0.0, jnp.abs(u / jnp.where(w == 0, 1.0, w))), axis=1)
        count = count + jnp.sum(w != 0, axis=1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.inf)
