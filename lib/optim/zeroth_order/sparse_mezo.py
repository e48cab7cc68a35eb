"""Sparse MeZO: only small weights move."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Key

from .directions import Direction, gaussian
from .estimators import two_point
from .step import StepInfo, zo_step


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
    if not 0 < density <= 1:
        raise ValueError(f"density: got {density}; expected a share in (0, 1]")
    return jax.tree.map(lambda x: jnp.quantile(jnp.abs(x.astype(jnp.float32)), density), params)


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

    def chosen(key, index, path, x):
        z = direction(key, index, path, x)
        return None if z is None else jnp.where(jnp.abs(x) <= limits[index], z, 0.0)

    return chosen


def sparse_mezo_step(
    loss_fn,
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: float | Array,
    epsilon: float,
    thresholds: Any,
) -> tuple[Any, StepInfo]:
    """A MeZO step of the weights below their thresholds; the others stay bit for bit.

    The two passes see moved copies, because a mask drawn from moved weights would be another mask.

    Args:
      loss_fn, params, key, learning_rate, epsilon: as in `mezo_step`.
      thresholds: from `magnitude_thresholds`, once.

    Source: Liu et al. 2024, Sparse MeZO (arXiv 2402.15751).

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
    return zo_step(
        loss_fn, params, key, learning_rate=learning_rate, estimator=estimator, direction=sparse(thresholds)
    )
