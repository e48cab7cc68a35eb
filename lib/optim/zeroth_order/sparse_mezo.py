"""Steps of some weights: Sparse MeZO moves the small ones, the benchmark's gradient sparsity random ones."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Key

from .directions import Direction, gaussian, leaves_with_paths
from .estimators import two_point
from .noise import random_bits
from .step import Rate, StepInfo, zo_step


def magnitude_thresholds(params: Any, density: float) -> Any:
    """Find for each leaf the magnitude that the share `density` of its weights lies below.

    Args:
      params: a tree of arrays.
      density: in (0, 1]: the share of weights that move.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> float(frugax.optim.zeroth_order.magnitude_thresholds(jnp.arange(-4.0, 5.0), 0.5))
        2.0
    """
    _check("density", density)
    return jax.tree.map(lambda x: jnp.quantile(_magnitude(x), density), params)


def magnitude_densities(params: Any, density: float) -> dict[str, float]:
    """Find each leaf's share of weights below the magnitude that `density` of all weights lie below.

    Leaves of small weights get more than their part, as the benchmark's "global" sparsity gives them, for
    `random_subset`.

    Args:
      params: a tree of concrete arrays.
      density: in (0, 1]: the share of all weights.

    Returns:
      Each leaf's path and share.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592), and its code.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"small": jnp.full(30, 0.1), "large": jnp.arange(1.0, 11.0)}
        >>> frugax.optim.zeroth_order.magnitude_densities(params, 0.75)
        {'large': 0.0, 'small': 1.0}
    """
    _check("density", density)
    leaves = leaves_with_paths(params)
    every = jnp.sort(jnp.concatenate([_magnitude(x).ravel() for _, x in leaves]))
    limit = every[max(round(density * every.size), 1) - 1]
    return {path: float(jnp.mean(_magnitude(x) <= limit)) for path, x in leaves}


def sparse(thresholds: Any, direction: Direction = gaussian) -> Direction:
    """A direction with zeros for weights above their leaf's threshold; no mask is kept between steps.

    Args:
      thresholds: a scalar for each leaf, from `magnitude_thresholds`.
      direction: of the rest.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> w = jnp.array([0.1, 5.0])
        >>> moved = zo.displace(w, jax.random.key(0), 1.0, zo.sparse(jnp.float32(1.0)))
        >>> bool(moved[0] == w[0]), bool(moved[1] == w[1])
        (False, True)
    """
    limits = jax.tree.leaves(thresholds)

    def chosen(key, index, path, x, start=0):
        z = direction(key, index, path, x, start)
        return None if z is None else jnp.where(jnp.abs(x) <= limits[index], z, 0.0)

    return chosen


def random_subset(
    density: float | dict[str, float],
    direction: Direction = gaussian,
    *,
    mask_key: Key[Array, ""] | None = None,
) -> Direction:
    """A direction with zeros for random weights: each moves with the probability `density`.

    Args:
      density: of every leaf, or for each path, from `magnitude_densities`.
      direction: of those that move.
      mask_key: names the mask; give several steps the same one to keep the mask for as long. None: each
        step's key draws its own.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592), gradient sparsity.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> moved = zo.displace(jnp.zeros(10_000), jax.random.key(0), 1.0, zo.random_subset(0.1))
        >>> round(float((moved != 0).mean()), 2)
        0.1
    """
    for share in density.values() if isinstance(density, dict) else [density]:
        _check("density", share, least=0.0)

    def chosen(key, index, path, x, start=0):
        z = direction(key, index, path, x, start)
        if z is None:
            return None
        share = density[path] if isinstance(density, dict) else density
        # Another stream than the direction's: the leaf's key of the reversed order of folds.
        own = jax.random.fold_in(jax.random.fold_in(key if mask_key is None else mask_key, 2**31), index)
        bits = random_bits(own, x.shape, start) >> 8  # 24 bits: exact in float32
        return jnp.where(bits < round(share * 2**24), z, 0.0)

    return chosen


def sparse_mezo_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: Rate,
    epsilon: float,
    thresholds: Any,
    **options: Any,
) -> tuple[Any, StepInfo]:
    """A MeZO step of the weights below their thresholds; the others stay bit for bit.

    Weights are masked and moved inside the forward pass, where the loss reads them: one layer at a time where
    it scans over stacked layers (`lax.scan`, `nn.scan`), else one leaf. There is no moved copy of the params
    and no stored mask; params stay where they are until the step, because a mask drawn from moved weights
    would be another one.

    Args:
      loss_fn, params, key, learning_rate, epsilon: as in `mezo_step`.
      thresholds: from `magnitude_thresholds`, once.
      **options: clip, count, weight_decay and decays of `zo_step`.

    Raises:
      ValueError: as `zo_step`.

    Source: Liu et al. 2024, Sparse MeZO (arXiv 2402.15751), section 3.3.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> w = jnp.array([0.1, -0.2, 3.0, 4.0])
        >>> new, _ = zo.sparse_mezo_step(lambda w: jnp.sum((w - 1) ** 2), w, jax.random.key(0), epsilon=1e-3,
        ...                              learning_rate=0.1, thresholds=zo.magnitude_thresholds(w, 0.5))
        >>> (new != w).tolist()
        [True, True, False, False]
    """
    estimator = two_point(epsilon, in_place=False)
    way = sparse(thresholds)
    return zo_step(
        loss_fn, params, key, learning_rate=learning_rate, estimator=estimator, direction=way, **options
    )


def _magnitude(x: Array) -> Array:
    return jnp.abs(x).astype(jnp.float32)


def _check(name: str, share: float, least: float | None = None) -> None:
    if not (0 < share <= 1 or share == least):
        raise ValueError(f"{name}: got {share}; expected a share in (0, 1]")
