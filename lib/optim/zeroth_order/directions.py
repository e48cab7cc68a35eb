"""Directions to move parameters along: trees of numbers that are computed where they are added."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..common.where_read import changed_where_read
from .noise import normal_like

# (key of the step, leaf's number, leaf's path, the leaf or a slice, place of its first number) -> direction
Direction = Callable[[Array, int, str, Array, Array | int], Array | None]


def gaussian(key: Array, index: int, path: str, x: Array, start: Array | int = 0) -> Array | None:
    """Standard normal numbers in every inexact leaf; leaf i's are `jax.random.normal(fold_in(key, i))`.

    Args:
      key: of the step.
      index: of the leaf.
      path: of the leaf, names joined by "/".
      x: the leaf, or a slice of it.
      start: row-major place in the leaf of x's first number.

    Returns:
      float32 of x's shape, or complex64 with independent standard normal parts for a complex leaf; None, for
      leaves of integers, leaves the leaf where it is.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> key = jax.random.key(0)
        >>> z = frugax.optim.zeroth_order.gaussian(key, 0, "w", jnp.ones(3))
        >>> bool((z == jax.random.normal(jax.random.fold_in(key, 0), (3,))).all())
        True
    """
    own = jax.random.fold_in(key, index)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return lax.complex(normal_like(own, x, start), normal_like(jax.random.fold_in(own, 1), x, start))
    return normal_like(own, x, start) if jnp.issubdtype(x.dtype, jnp.floating) else None


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

    def chosen(key, index, path, x, start=0):
        return direction(key, index, path, x, start) if where(path) else None

    return chosen


def displace(
    params: Any,
    key: Array,
    amount: float | Array,
    direction: Direction = gaussian,
    *,
    back: float | Array = 0.0,
    decay: float | Array = 0.0,
    decays: Callable[[str], bool] | None = None,
) -> Any:
    """(1 - decay) (params + back * direction) + amount * direction, in place where params are donated.

    No temporary has a leaf's size.

    Args:
      params: a tree of arrays.
      key: names the direction.
      amount: how far.
      direction: the shape of it.
      back: how far to go before weights shrink: from where an estimator left them.
      decay: share by which weights shrink; those that the direction leaves alone don't.
      decays: a leaf's path -> whether it shrinks; None: all.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> there = zo.displace(jnp.zeros(3), jax.random.key(0), 1e-3)
        >>> back = zo.displace(there, jax.random.key(0), -1e-3)
        >>> bool(abs(back).max() < 1e-9)
        True
    """
    shrinks = not (isinstance(decay, int | float) and decay == 0)
    moved = []
    for i, (path, x) in enumerate(leaves_with_paths(params)):
        z = direction(key, i, path, x, 0)
        kept = 1 - decay if shrinks and (decays is None or decays(path)) else None
        total = amount + back if kept is None else amount + kept * back
        moved.append(x if z is None else _moved(x, z, total, kept))
    return jax.tree.unflatten(jax.tree.structure(params), moved)


def loss_along(
    loss_fn: Callable[[Any], Any],
    params: Any,
    key: Array,
    amount: Array,
    direction: Direction = gaussian,
    *,
    branch: bool = True,
) -> Any:
    """loss_fn(params + amount * direction), with leaves moved where the loss reads them, not in a copy.

    `branch` puts the move behind a condition, so that XLA can't make the noise again in each product of it.
    Without it there is a derivative by `amount` at zero.
    """
    paths = [path for path, _ in leaves_with_paths(params)]

    def read(i: int, x: Array, start: Array | int, after: Sequence[Array]) -> Array:
        now, *_ = lax.optimization_barrier((amount, *after))  # the move waits for what it is read with

        def move() -> Array:
            z = direction(key, i, paths[i], x, start)
            return x if z is None else _moved(x, z, now)

        return lax.cond(now != 0, move, lambda: x) if branch else move()

    return changed_where_read(loss_fn, params, read)


def leaves_with_paths(params: Any) -> list[tuple[str, Array]]:
    """Each leaf as an array with its path, names joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), jnp.asarray(x)) for path, x in leaves]


def check_key(key: Any) -> None:
    """Raise unless this is one key of jax.random, of either kind."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and shape == () and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return
    if dtype != jnp.uint32 or len(shape) != 1:
        got = key if dtype is None else f"{dtype}{list(shape)}"
        raise ValueError(f"key: got {got}; expected one key, such as jax.random.key(0)")


def check_moves(params: Any, key: Array, direction: Direction) -> None:
    """Raise where the direction moves no leaf at all: such a step would do nothing, in silence."""
    check_key(key)
    found = leaves_with_paths(params)
    for i, (path, x) in enumerate(found):
        if jax.eval_shape(lambda key, i=i, path=path, x=x: direction(key, i, path, x, 0), key) is not None:
            return
    listed = ", ".join(f"{path} ({x.dtype})" for path, x in found) or "none"
    raise ValueError(f"params: got leaves {listed}, of which the direction moves none; expected at least one")


def _moved(x: Array, z: Array, amount: float | Array, kept: float | Array | None = None) -> Array:
    step = amount * z
    info = jnp.finfo(x.dtype)
    if info.bits >= 32:
        start = x if kept is None else jnp.where(z == 0, x, (kept * x).astype(x.dtype))
        return start + step.astype(x.dtype)
    # XLA may keep a fused 16-bit sum in float32: then a replay, fused otherwise, would end elsewhere.
    wide = x.astype(jnp.float32)
    start = wide if kept is None else jnp.where(z == 0, wide, kept * wide)
    return lax.reduce_precision(start + step, info.nexp, info.nmant).astype(x.dtype)
