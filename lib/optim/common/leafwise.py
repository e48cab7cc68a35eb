"""The frame of every optimizer here: matrices go one way, as [..., m, n], and all other leaves another."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from .matrix_spec import Decision, MatrixSpec
from .placement import automatic, placed

_log = logging.getLogger("frugax.optim")


class LeafwiseState(NamedTuple):
    """Steps so far, and the params' tree with each leaf's own state in its place.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> tx = frugax.optim.galore(1e-2, rank=2)
        >>> state = tx.init({"w": jnp.ones((4, 6))})
        >>> state[0].leaves["w"].projector.shape
        (4, 2)
    """

    step: Array
    leaves: Any


class Turn(NamedTuple):
    """Where an update stands: leaf of matrices number `leaf` of `leaves`, at `step`."""

    leaf: int
    leaves: int
    step: Array


def leafwise(
    init_matrices: Callable[[Decision, Any], Any],
    update_matrices: Callable[[Decision, Turn, Array, Array | None, Any], tuple[Array, Any]],
    plain: optax.GradientTransformation,
    spec: MatrixSpec | None,
    side: str,
) -> optax.GradientTransformation:
    """A transformation from what becomes of a leaf of matrices, and of another leaf.

    Everything is kept and computed in float32 (float64 for float64 gradients); updates come back in the
    gradients' dtype. `init` logs what becomes of each leaf, once (level INFO of the logger "frugax.optim").

    Args:
      init_matrices: (decision, dtype) -> the state of a leaf of matrices `decision.view.matrices`.
      update_matrices: (decision, turn, g, w, state) -> (update, state); g, w and update are [..., m, n], w is
        None where the caller gives no params.
      plain: for the other leaves.
      spec: which leaves are matrices; None: `MatrixSpec()`.
      side: which side of them is m.
    """
    spec = spec or MatrixSpec()

    def init_leaf(decision: Decision, leaf: Any) -> Any:
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        if decision.view is None:
            return plain.init(jnp.zeros_like(leaf, dtype))
        return placed(init_matrices(decision, dtype), leaf, decision.view)

    def update_leaf(decision: Decision, turn: Turn, g: Array, w: Array | None, state: Any):
        dtype = jnp.promote_types(g.dtype, jnp.float32)
        wide_g, wide_w = (None if x is None else jnp.asarray(x, dtype) for x in (g, w))
        if decision.view is None:
            u, state = plain.update(wide_g, state, wide_w)
            return u.astype(g.dtype), state
        split, join = decision.view.split, decision.view.join

        def update(g: Array, w: Array | None, state: Any, step: Array) -> tuple[Array, Any]:
            now = turn._replace(step=step)
            u, state = update_matrices(decision, now, split(g), w if w is None else split(w), state)
            return join(u), state

        u, state = automatic(update, wide_g, wide_w, state, turn.step)
        return u.astype(g.dtype), state

    def init(params: Any) -> LeafwiseState:
        leaves, tree = _flat(params)
        _say_once(spec.table(params, side))
        made = [init_leaf(*pair) for pair in zip(spec.decisions(params, side), leaves, strict=True)]
        return LeafwiseState(jnp.zeros((), jnp.int32), tree.unflatten(made))

    def update(updates: Any, state: LeafwiseState, params: Any = None) -> tuple[Any, LeafwiseState]:
        decisions = spec.decisions(updates, side)
        gradients, tree = _flat(updates)
        weights = [None] * len(gradients) if params is None else tree.flatten_up_to(params)
        states = tree.flatten_up_to(state.leaves)
        for decision, g, leaf_state in zip(decisions, gradients, states, strict=True):
            _check_state(decision, jax.eval_shape(lambda d=decision, g=g: init_leaf(d, g)), leaf_state)
        many = sum(decision.view is not None for decision in decisions)
        done, number = [], 0
        for decision, g, w, leaf_state in zip(decisions, gradients, weights, states, strict=True):
            done.append(update_leaf(decision, Turn(number, many, state.step), g, w, leaf_state))
            number += decision.view is not None
        after = LeafwiseState(optax.safe_increment(state.step), tree.unflatten([s for _, s in done]))
        return tree.unflatten([u for u, _ in done]), after

    return optax.GradientTransformation(init, update)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


@functools.lru_cache(maxsize=64)
def _say_once(table: str) -> None:
    _log.info("which leaves are matrices, and why:\n%s", table)


def _check_state(decision: Decision, expected: Any, state: Any) -> None:
    def shapes(tree):
        return {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)}

    fits, got = shapes(expected), shapes(state)
    wrong = sorted(name for name in {*fits, *got} if fits.get(name) != got.get(name))
    if wrong:
        made, now = (of.get(wrong[0], "nothing") for of in (got, fits))
        raise ValueError(
            f"state: for {decision.path} it has {made} at {wrong[0]}, where this optimizer has {now}; "
            "a state made with the same rank, projector, spec and side fits"
        )
