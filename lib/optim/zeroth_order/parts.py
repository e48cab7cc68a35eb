"""Steps that treat parts of a model apart: block by block, or some leaves by gradients and some without."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Int, Key

from .directions import Direction, check_moves, displace, gaussian, leaves_with_paths, only
from .estimators import Estimator, two_point
from .step import Rate, StepInfo, rate_of, taken, zo_step


def blockwise_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    blocks: Sequence[Callable[[str], bool]],
    learning_rate: Rate,
    epsilon: float,
    at_once: bool = False,
    clip: float | None = None,
    count: int | Int[Array, ""] | None = None,
) -> tuple[Any, StepInfo]:
    """A MeZO step of one block of leaves after the other, each along its own direction.

    A slope of a block has the variance of a model of the block's size. A step costs two forward passes for
    each block, and is compiled once for all.

    Args:
      loss_fn, params, key, epsilon, clip, count: as in `zo_step`.
      blocks: for each block a leaf's path -> whether it belongs; the first that takes a leaf has it, and
        leaves that none takes don't move.
      learning_rate: of each block's step, or an Optax schedule of `count`.
      at_once: find all slopes at the same params and then move. False: each block moves before the next one
        is looked at.

    Returns:
      New params, and a `StepInfo` with a leading axis of blocks.

    Raises:
      ValueError: a block has no leaf that moves.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592), block-wise ZO, and both forms of its code.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> params = {"a": jnp.ones(3), "b": jnp.ones(2)}
        >>> new, info = frugax.optim.zeroth_order.blockwise_step(
        ...     lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2), params, jax.random.key(0),
        ...     blocks=[lambda path: path == "a", lambda path: path == "b"], learning_rate=0.1, epsilon=1e-3)
        >>> info.slope.shape
        (2,)
    """
    paths = [path for path, _ in leaves_with_paths(params)]
    of_leaf = [next((b for b, belongs in enumerate(blocks) if belongs(path)), None) for path in paths]
    for b in range(len(blocks)):
        own = {path for path, block in zip(paths, of_leaf, strict=True) if block == b}
        check_moves(params, key, only(own.__contains__))

    def times(factor: Callable[[int], Array]) -> Direction:
        def scaled(key, index, path, x, start=0):
            block = of_leaf[index]
            z = None if block is None else gaussian(key, index, path, x, start)
            return None if z is None else factor(block) * z

        return scaled

    def step(params, block):
        own = times(lambda b: jnp.where(b == block, 1.0, 0.0))
        if not at_once:
            return zo_step(
                loss_fn,
                params,
                key,
                learning_rate=learning_rate,
                estimator=two_point(epsilon),
                direction=own,
                clip=clip,
                count=count,
            )
        found = two_point(epsilon, in_place=False)(loss_fn, params, key, own)
        return params, taken(found.loss, found.slope, rate_of(learning_rate, count), clip)

    params, infos = lax.scan(step, params, jnp.arange(len(blocks)))
    if at_once:
        params = displace(params, key, 1.0, times(lambda b: infos.scalar[b]))
    return params, infos


def first_order_part(params: Any, where: Callable[[str], bool]) -> dict[str, Array]:
    """Take the leaves that `hybrid_step` trains by gradients: each path and leaf.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"head": jnp.ones(2), "body": jnp.ones(3)}
        >>> list(frugax.optim.zeroth_order.first_order_part(params, lambda path: path == "head"))
        ['head']
    """
    return {path: x for path, x in leaves_with_paths(params) if where(path)}


def hybrid_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    optimizer: optax.GradientTransformation,
    state: Any,
    *,
    first_order: Callable[[str], bool],
    learning_rate: Rate,
    estimator: Estimator,
    clip: float | None = None,
    count: int | Int[Array, ""] | None = None,
) -> tuple[Any, Any, StepInfo]:
    """Train the last leaves of a model by gradients and the others by forward passes, in one step.

    Backpropagation ends where the leaves of `first_order` do: a model's first layers keep no activations.

    Args:
      loss_fn, params, key, clip, count: as in `zo_step`.
      optimizer: of the leaves that `first_order` finds, such as `optax.adam(1e-3)`.
      state: of the optimizer, `optimizer.init(first_order_part(params, first_order))` at first.
      first_order: a leaf's path -> whether it is trained by its gradient.
      learning_rate: of the other leaves, or an Optax schedule of `count`.
      estimator: of the other leaves' slope; it leaves params where they are
        (`two_point(epsilon, in_place=False)`, `forward_gradient()`).

    Returns:
      New params, the optimizer's state, and a `StepInfo` of the other leaves.

    Raises:
      ValueError: one of the two parts has no leaf.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592), hybrid training.

    Example:
        >>> import frugax, jax, jax.numpy as jnp, optax
        >>> zo, where = frugax.optim.zeroth_order, lambda path: path == "head"
        >>> params, tx = {"body": jnp.ones(3), "head": jnp.ones(3)}, optax.sgd(0.1)
        >>> new, state, info = zo.hybrid_step(
        ...     lambda p: jnp.sum((p["body"] * p["head"]) ** 2), params, jax.random.key(0), tx,
        ...     tx.init(zo.first_order_part(params, where)), first_order=where, learning_rate=0.01,
        ...     estimator=zo.forward_gradient())
        >>> bool(abs(new["head"] - 0.8).max() < 1e-6)
        True
    """
    with_gradients = first_order_part(params, first_order)
    if not with_gradients:
        raise ValueError("first_order: got no leaf of params; expected at least one")
    way = only(lambda path: path not in with_gradients)
    check_moves(params, key, way)

    def merged(some: dict[str, Array], whole: Any) -> Any:
        leaves = [some.get(path, x) for path, x in leaves_with_paths(whole)]
        return jax.tree.unflatten(jax.tree.structure(whole), leaves)

    gradient = jax.grad(lambda some: loss_fn(merged(some, params)))(with_gradients)
    updates, state = optimizer.update(gradient, state, with_gradients)
    found = estimator(loss_fn, params, key, way)
    info = taken(found.loss, found.slope, rate_of(learning_rate, count), clip)
    moved = displace(params, key, info.scalar, way)
    return merged(optax.apply_updates(with_gradients, updates), moved), state, info
