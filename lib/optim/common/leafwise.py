"""The frame of the optimizers here: matrices take one rule, as [..., m, n], and all other leaves another."""

import functools
import logging
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .matrix_spec import Decision, MatrixSpec, View
from .placement import automatic, placed

_log = logging.getLogger("frugax.optim")


class LeafwiseState(NamedTuple):
    """The steps so far, and the tree of params with each leaf replaced by its own state.

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
    """The place of an update: number `leaf` of the `leaves` leaves of matrices, at `step`.

    All fields are data, not static, so that leaves of one shape share a trace.
    """

    leaf: Any
    leaves: Any
    step: Array
    path_hash: Any  # uint32, of the leaf's path


def leafwise(
    init_matrices: Callable[[Decision, Any], Any],
    update_matrices: Callable[[View, Turn, Array, Array | None, Any], tuple[Array, Any]],
    plain: optax.GradientTransformation,
    spec: MatrixSpec | None,
    side: str,
) -> optax.GradientTransformation:
    """Make a transformation from a rule for leaves of matrices and one for the other leaves.

    Everything is kept and computed in float32 (float64 for float64 gradients); updates come back in the
    gradients' dtype. `init` logs the decision for each leaf, once (level INFO of the logger "frugax.optim").

    Args:
      init_matrices: (decision, dtype) -> the state of a leaf of matrices `decision.view.matrices`.
      update_matrices: (view, turn, g, w, state) -> (update, state); g, w and update are [..., m, n], w is
        None where the caller gives no params. It is traced once for all leaves of the same shape and dtype.
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

    @functools.partial(jax.jit, static_argnums=0)
    def update_leaf(view: View | None, turn: Turn, g: Array, w: Array | None, state: Any):
        dtype = jnp.promote_types(g.dtype, jnp.float32)
        wide_g, wide_w = (None if x is None else jnp.asarray(x, dtype) for x in (g, w))
        if view is None:
            u, state = plain.update(wide_g, state, wide_w)
            return u.astype(g.dtype), state

        def update(g: Array, w: Array | None, state: Any, turn: Turn) -> tuple[Array, Any]:
            u, state = update_matrices(view, turn, view.split(g), w if w is None else view.split(w), state)
            return view.join(u), state

        u, state = automatic(update, wide_g, wide_w, state, turn)
        return u.astype(g.dtype), state

    @functools.lru_cache(maxsize=16)
    def expected(tree: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> list[tuple[Decision, Any]]:
        """Decide for each leaf, with the shapes of its state; worked out once for a tree of shapes."""
        states: dict[Any, Any] = {}
        found = []
        for decision, leaf in zip(spec.decisions(tree.unflatten(leaves), side), leaves, strict=True):
            kind = (decision.view, leaf)
            if kind not in states:
                states[kind] = jax.eval_shape(functools.partial(init_leaf, decision), leaf)
            found.append((decision, states[kind]))
        return found

    def init(params: Any) -> LeafwiseState:
        leaves, tree = _flat(params)
        _say_once(spec.table(params, side))
        made = [init_leaf(*pair) for pair in zip(spec.decisions(params, side), leaves, strict=True)]
        return LeafwiseState(jnp.zeros((), jnp.int32), tree.unflatten(made))

    def update(updates: Any, state: LeafwiseState, params: Any = None) -> tuple[Any, LeafwiseState]:
        gradients, tree = _flat(updates)
        decided = expected(tree, tuple(jax.ShapeDtypeStruct(g.shape, g.dtype) for g in gradients))
        weights = [None] * len(gradients) if params is None else tree.flatten_up_to(params)
        states = tree.flatten_up_to(state.leaves)
        for (decision, shapes), leaf_state in zip(decided, states, strict=True):
            _check_state(decision, shapes, leaf_state)
        many = sum(decision.view is not None for decision, _ in decided)
        done, number = [], 0
        for (decision, _), g, w, leaf_state in zip(decided, gradients, weights, states, strict=True):
            path_hash = np.uint32(zlib.crc32(decision.path.encode()))
            turn = Turn(np.int32(number), np.int32(many), state.step, path_hash)
            done.append(update_leaf(decision.view, turn, g, w, leaf_state))
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
    (leaves, tree), (now, its_tree) = _flat(expected), _flat(state)
    if tree == its_tree and all(a.shape == b.shape for a, b in zip(leaves, now, strict=True)):
        return

    def shapes(tree):
        return {jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(tree)}

    want, got = shapes(expected), shapes(state)
    wrong = sorted(name for name in {*want, *got} if want.get(name) != got.get(name))
    if wrong:
        made, wanted = (found.get(wrong[0], "nothing") for found in (got, want))
        raise ValueError(
            f"state: got {made} at {wrong[0]} for {decision.path}; expected {wanted}, as in a state made "
            "with the same rank, projector, spec and side"
        )
