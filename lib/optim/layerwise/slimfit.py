"""SlimFit's schedule: of stacked layers, only those that the last updates moved most are trained."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.containers import find, named_leaves, nested
from .active import LAYERS, is_stacked
from .lisa import depth
from .step import Layerwise


class SlimFitState(NamedTuple):
    """The distance that each layer last moved [layers], and inner's states, with the layers' along axis 0.

    States are nested in dicts by the leaves' paths. `stacked` has one of each stacked leaf; with `together`
    it is one of all of them, as `rest` is of the other leaves. `optax.MaskedNode()` stands for the others.
    """

    distance: Array
    stacked: Any
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
      ValueError: a rate beyond 0 to 1; `layers` finds nothing; stacks of several depths with `together`.

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
    if isinstance(freeze_rate, int | float) and not 0 <= freeze_rate <= 1:
        raise ValueError(f"freeze_rate: got {freeze_rate}; expected 0 to 1")

    def split(tree: Any) -> tuple[Any, Any]:
        """The stacked leaves and the others, in nested dicts with nothing in the places of the rest."""
        leaves, which = named_leaves(tree), is_stacked(tree, layers)
        names = [path for path, _ in leaves]
        nothing = optax.MaskedNode()
        stacked = [x if is_one else nothing for (_, x), is_one in zip(leaves, which, strict=True)]
        rest = [nothing if is_one else x for (_, x), is_one in zip(leaves, which, strict=True)]
        return nested(names, stacked), nested(names, rest)

    def joined(stacked: Any, rest: Any, like: Any) -> Any:
        leaves = [
            find(stacked if is_one else rest, names)
            for (names, _), is_one in zip(named_leaves(like), is_stacked(like, layers), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def init(params: Any) -> SlimFitState:
        if not jax.tree.leaves(params):  # a placeholder, by which Optax asks where params are in a state
            return SlimFitState(jnp.zeros(0), inner.init(params) if together else params, inner.init(params))
        if together:
            depth(params, layers)
        stacked, rest = split(params)
        many = list(map(len, jax.tree.leaves(stacked)))
        distance = jnp.full(many[0] if together else sum(many), jnp.inf, jnp.float32)
        each = jax.vmap(inner.init)
        states = each(stacked) if together else jax.tree.map(each, stacked)
        return SlimFitState(distance, states, inner.init(rest))

    def update(updates: Any, state: SlimFitState, params: Any = None) -> tuple[Any, SlimFitState]:
        if params is None:
            raise ValueError("params: got None; expected the params: layers move relative to them")
        (g, rest), (w, rest_w) = split(updates), split(params)
        new_rest, rest_state = inner.update(rest, state.rest, rest_w)
        if together:
            u, distance, states = _some(inner, g, w, state, active(state, None))
        else:
            moves = _ranked(state.distance) < jnp.round((1 - freeze_rate) * state.distance.size).astype(
                jnp.int32
            )
            u, distance, states = _masked(inner, moves, g, w, state)
        return joined(u, new_rest, updates), SlimFitState(distance, states, rest_state)

    def active(state: SlimFitState, params: Any) -> Array:
        many = max(round((1 - freeze_rate) * len(state.distance)), 1)
        return jnp.sort(jnp.argsort(-state.distance, stable=True)[:many])

    rule = optax.GradientTransformation(init, update)
    return Layerwise(rule, active, layers) if together else rule


def _masked(inner: Any, moves: Array, g: Any, w: Any, state: SlimFitState) -> tuple[Any, Array, Any]:
    """Inner on all layers of each leaf, of which those that don't move stay as they are."""
    leaves = jax.tree.leaves(g)
    tree: Any = jax.tree.structure(g)
    ends = list(itertools.accumulate(map(len, leaves)))[:-1]
    parts = (jnp.split(x, ends) for x in (moves, state.distance))
    found = []
    for g_leaf, w_leaf, before, moves_leaf, distance in zip(
        leaves, tree.flatten_up_to(w), tree.flatten_up_to(state.stacked), *parts, strict=True
    ):
        u, after = jax.vmap(inner.update)(g_leaf, before, w_leaf)
        after = jax.tree.map(lambda a, b, moves=moves_leaf: _choose(moves, a, b), after, before)
        distance = jnp.where(moves_leaf, _distance(u, w_leaf), distance)
        found.append((_choose(moves_leaf, u, jnp.zeros_like(u)), distance, after))
    new, distances, states = (list(part) for part in zip(*found, strict=True))
    return tree.unflatten(new), jnp.concatenate(distances), tree.unflatten(states)


def _some(inner: Any, g: Any, w: Any, state: SlimFitState, active: Array) -> tuple[Any, Array, Any]:
    """Inner on the active layers alone; g and w have all layers or these."""
    many = len(state.distance)
    whole = len(jax.tree.leaves(g)[0]) == many
    take = lambda tree: jax.tree.map(lambda x: jnp.take(x, active, axis=0), tree)  # noqa: E731
    if whole:
        g, w = take(g), take(w)
    u, after = jax.vmap(inner.update)(g, take(state.stacked), w)
    put = lambda old, new: old.at[active].set(new, unique_indices=True)  # noqa: E731
    distance = put(state.distance, _distance(u, w))
    if whole:
        u = jax.tree.map(lambda x: jnp.zeros((many, *x.shape[1:]), x.dtype).at[active].set(x), u)
    return u, distance, jax.tree.map(put, state.stacked, after)


def _ranked(distance: Array) -> Array:
    """Each layer's place, those that moved most first."""
    order = jnp.argsort(-distance, stable=True)
    return jnp.zeros(distance.size, jnp.int32).at[order].set(jnp.arange(distance.size, dtype=jnp.int32))


def _choose(active: Array, new: Array, old: Array) -> Array:
    return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _distance(updates: Any, weights: Any) -> Array:
    """The mean of |dW / W| over the entries of each layer that aren't zero; inf where all are."""
    total = count = jnp.zeros((), jnp.float32)
    for u, w in zip(jax.tree.leaves(updates), jax.tree.leaves(weights), strict=True):
        u, w = (x.astype(jnp.float32).reshape(len(x), -1) for x in (u, w))
        total = total + jnp.sum(jnp.where(w == 0, 0.0, jnp.abs(u / jnp.where(w == 0, 1.0, w))), axis=1)
        count = count + jnp.sum(w != 0, axis=1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.inf)
