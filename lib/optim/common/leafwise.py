"""The frame of the optimizers here: matrices take one rule, as [..., m, n], and all other leaves another."""

import functools
import logging
import math
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from .containers import Names, find, named_leaves, nested
from .matrix_spec import BY_DEFAULT, Decision, MatrixAxes, MatrixSpec, View
from .placement import automatic, placed
from .state_bytes import state_bytes

_log = logging.getLogger("frugax.optim")


class LeafwiseState(NamedTuple):
    """The steps so far, and the state of each leaf of params, in nested dicts by the leaf's path.

    For params in nested dicts, that is the tree of params with each leaf replaced by its own state. To map
    over such states beside a tree of shardings, say so to Optax:
    `optax.tree_utils.tree_map_params(tx, f, state, shardings, is_leaf=lambda x: not isinstance(x, dict))`.

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
    def expected(leaves: tuple[tuple[Names, jax.ShapeDtypeStruct], ...]) -> list[tuple[Decision, Any]]:
        """Decide for each leaf, with the shapes of its state; worked out once for a tree of shapes."""
        states: dict[Any, Any] = {}
        found = []
        for decision, (_, leaf) in zip(spec.decisions_of(list(leaves), side), leaves, strict=True):
            kind = (decision.view, leaf)
            if kind not in states:
                states[kind] = jax.eval_shape(functools.partial(init_leaf, decision), leaf)
            found.append((decision, states[kind]))
        return found

    def init(params: Any) -> LeafwiseState:
        leaves, step = named_leaves(params), jnp.zeros((), jnp.int32)
        if not leaves:  # nothing but a placeholder, by which Optax asks where params are in a state
            return LeafwiseState(step, params)
        _say_once(spec.table(params, side))
        made = []
        for decision, (_, leaf) in zip(spec.decisions_of(leaves, side), leaves, strict=True):
            if decision.why == BY_DEFAULT and decision.view.is_like_heads:
                _warn_of_heads(decision, leaf, init_leaf)
            made.append(init_leaf(decision, leaf))
        return LeafwiseState(step, nested([names for names, _ in leaves], made))

    def update(updates: Any, state: LeafwiseState, params: Any = None) -> tuple[Any, LeafwiseState]:
        gradients, (_, tree) = named_leaves(updates), _flat(updates)
        decided = expected(tuple((names, jax.ShapeDtypeStruct(g.shape, g.dtype)) for names, g in gradients))
        weights = dict(named_leaves(params))
        states = [find(state.leaves, names) for names, _ in gradients]
        for (decision, shapes), leaf_state in zip(decided, states, strict=True):
            _check_state(decision, shapes, leaf_state)
        many = sum(decision.view is not None for decision, _ in decided)
        done, number = [], 0
        for (decision, _), (names, g), leaf_state in zip(decided, gradients, states, strict=True):
            if params is not None and names not in weights:
                raise ValueError(f"params: got nothing at {decision.path}; expected {list(g.shape)}")
            path_hash = np.uint32(zlib.crc32(decision.path.encode()))
            turn = Turn(np.int32(number), np.int32(many), state.step, path_hash)
            done.append(update_leaf(decision.view, turn, g, weights.get(names), leaf_state))
            number += decision.view is not None
        leaves = nested([names for names, _ in gradients], [s for _, s in done]) if done else state.leaves
        after = LeafwiseState(optax.safe_increment(state.step), leaves)
        return tree.unflatten([u for u, _ in done]), after

    return optax.GradientTransformation(init, update)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


@functools.lru_cache(maxsize=64)
def _say_once(table: str) -> None:
    _log.info("which leaves are matrices, and why:\n%s", table)


def _warn_of_heads(decision: Decision, leaf: Any, init_leaf: Callable[[Decision, Any], Any]) -> None:
    """Warn of a kernel [width, heads, head size] that is taken for `width` small matrices."""
    view: Any = decision.view
    axes = MatrixAxes((-3,), (-2, -1))
    flat = decision._replace(view=MatrixSpec().view_of(decision.path, view.shape, axes, "short"))
    try:
        now, then = (
            state_bytes(jax.eval_shape(functools.partial(init_leaf, d), leaf)) for d in (decision, flat)
        )
    except ValueError:  # of a rank that these small matrices don't have: it names the leaf
        return
    *batch, m, n = view.matrices
    warnings.warn(
        f"{decision.path} of shape {list(view.shape)} is taken for {math.prod(batch)} matrices of {m} x {n} "
        f"and keeps {now} bytes; with the rule {decision.path!r}: {axes} it keeps {then}",
        stacklevel=4,
    )


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
