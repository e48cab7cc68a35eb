"""Params in any container: Flax Linen's, nnx's, Equinox's or Haiku's, or plain dicts and lists.

A leaf is known by the names on the way to it. A box around an array (`nn.Partitioned` and its kin, an nnx
variable) adds no name, so that params have the same paths with and without boxes: `nnx.Optimizer` makes
states from boxed params and updates them with bare ones.
"""

import sys
from typing import Any

import jax
import optax

Names = tuple[str, ...]


def named_leaves(tree: Any) -> list[tuple[Names, Any]]:
    """List a tree's arrays in the order of `jax.tree.leaves`, each with the names on the way to it."""
    found = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box):
        skipped = 1 if _is_box(node) else 0
        for inside, x in jax.tree_util.tree_leaves_with_path(node):
            keys = (*path, *inside[skipped:])
            found.append((tuple(jax.tree_util.keystr((key,), simple=True) for key in keys), x))
    return found


def nested(names: list[Names], values: list[Any]) -> Any:
    """Make nested dicts with each value at its names; a value without names stands for itself."""
    tree: dict[str, Any] = {}
    for path, value in zip(names, values, strict=True):
        if not path:
            return value
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def find(tree: Any, names: Names) -> Any:
    """Look up what `nested` put at `names`; None where there is nothing."""
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def without_variables(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`rule` over bare arrays where params and updates hold nnx variables.

    An nnx variable holds one array. `nnx.Optimizer` can't update one that holds a `QuantizedTensor`.
    """
    inner = optax.with_extra_args_support(rule)

    def init(params: Any) -> Any:
        return inner.init(_bare(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        tree: Any = jax.tree.structure(updates)
        new, state = inner.update(_bare(updates), state, _bare(params), **extra_args)
        return tree.unflatten(jax.tree.leaves(new)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _bare(tree: Any) -> Any:
    """A tree with the values of its nnx variables in their places."""
    return jax.tree.map(lambda x: jax.tree.leaves(x)[0] if _is_variable(x) else x, tree, is_leaf=_is_variable)


def _is_box(x: Any) -> bool:
    meta = sys.modules.get("flax.core.meta")
    return _is_variable(x) or (meta is not None and isinstance(x, meta.AxisMetadata))


def _is_variable(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")  # whoever has a variable has imported it: no need to load it here
    return nnx is not None and isinstance(x, nnx.Variable)
