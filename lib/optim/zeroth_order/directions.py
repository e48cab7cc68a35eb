"""Directions to move parameters along: trees of numbers that are computed where they are added."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .noise import normal_like

Direction = Callable[[Array, int, str, Array], Array | None]


def gaussian(key: Array, index: int, path: str, x: Array) -> Array | None:
    """Standard normal numbers in every floating leaf; leaf i's are `jax.random.normal(fold_in(key, i))`.

    Args:
      key: of the step.
      index: of the leaf.
      path: of the leaf, names joined by "/".
      x: the leaf.

    Returns:
      float32 of x's shape; None leaves the leaf where it is.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> key = jax.random.key(0)
        >>> z = frugax.optim.zeroth_order.gaussian(key, 0, "w", jnp.ones(3))
        >>> bool((z == jax.random.normal(jax.random.fold_in(key, 0), (3,))).all())
        True
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    return normal_like(jax.random.fold_in(key, index), x)


def only(where: Callable[[str], bool], direction: Direction = gaussian) -> Direction:
    """A direction that moves some leaves alone, such as adapters.

    Args:
      where: a leaf's path -> whether it moves.
      direction: of those that do.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> biases = zo.only(lambda path: path.endswith("bias"))
        >>> moved = zo.displace({"bias": jnp.zeros(2), "w": jnp.zeros(2)}, jax.random.key(0), 1.0, biases)
        >>> bool(moved["bias"].any()), bool(moved["w"].any())
        (True, False)
    """

    def chosen(key, index, path, x):
        return direction(key, index, path, x) if where(path) else None

    return chosen


def displace(params: Any, key: Array, amount: float | Array, direction: Direction = gaussian) -> Any:
    """params + amount * direction, in place where the caller donates params; no leaf-sized temporary.

    Args:
      params: a tree of arrays.
      key: names the direction.
      amount: how far.
      direction: the shape of it.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> there = zo.displace(jnp.zeros(3), jax.random.key(0), 1e-3)
        >>> back = zo.displace(there, jax.random.key(0), -1e-3)
        >>> bool(abs(back).max() < 1e-9)
        True
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    moved = []
    for i, (path, x) in enumerate(leaves):
        z = direction(key, i, jax.tree_util.keystr(path, simple=True, separator="/"), x)
        moved.append(x if z is None else _add(x, amount * z))
    return jax.tree.unflatten(tree, moved)


def displaced_copy(params: Any, key: Array, amount: float | Array, direction: Direction = gaussian) -> Any:
    """`displace` for a loss: behind a condition, XLA can't make the noise again in each product of it."""
    return lax.cond(amount != 0, lambda: displace(params, key, amount, direction), lambda: params)


def _add(x: Array, step: Array) -> Array:
    if jnp.finfo(x.dtype).bits >= 32:
        return x + step.astype(x.dtype)
    # XLA may keep a fused 16-bit sum in float32: then a replay, fused otherwise, would end elsewhere.
    info = jnp.finfo(x.dtype)
    total = lax.reduce_precision(x.astype(jnp.float32) + step, info.nexp, info.nmant)
    return total.astype(x.dtype)
