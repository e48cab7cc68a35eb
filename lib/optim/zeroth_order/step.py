"""One step of zeroth-order descent: parameters move along a random direction, which is named by its key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from .directions import Direction, displace, displaced_copy, gaussian
from .estimators import Estimator, opaque_copies, two_point


class StepInfo(NamedTuple):
    """The record of a step. Its key and `scalar` are all that a replay needs."""

    loss: Float[Array, ""]  # before the step
    slope: Float[Array, ""]  # of the loss along the direction, clipped if asked for
    scalar: Float[Array, ""]  # how far along the direction the step went: -learning_rate * slope


def zo_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: float | Array,
    estimator: Estimator,
    direction: Direction = gaussian,
    clip: float | None = None,
) -> tuple[Any, StepInfo]:
    """params - learning_rate * slope * direction, with the slope from forward passes.

    Args:
      loss_fn: params -> scalar; needs no gradient under `two_point`.
      params: donate them to the surrounding `jit`: they are updated in place.
      key: fresh for each step; names the direction.
      learning_rate: of the step.
      estimator: `two_point(epsilon)` or `forward_gradient()`.
      direction: `gaussian`, `only(...)` some leaves, or `sparse(...)`.
      clip: the largest magnitude of a slope.

    Returns:
      New params and a `StepInfo`.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> w = jnp.ones(4)
        >>> for key in jax.random.split(jax.random.key(0), 100):
        ...     w, info = zo.zo_step(lambda w: jnp.sum(w**2), w, key, learning_rate=0.05,
        ...                          estimator=zo.forward_gradient())
        >>> bool(info.loss < 0.1)
        True
    """
    found = estimator(loss_fn, params, key, direction)
    slope = found.slope if clip is None else jnp.clip(found.slope, -clip, clip)
    scalar = -learning_rate * slope
    params = displace(found.params, key, scalar - found.offset, direction)
    return params, StepInfo(found.loss, slope, scalar)


def mezo_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: float | Array,
    epsilon: float,
    direction: Direction = gaussian,
) -> tuple[Any, StepInfo]:
    """MeZO: two forward passes at +-epsilon along a seeded direction, then a step along it, all in place.

    Args:
      loss_fn: params -> scalar, differentiable or not.
      params: donate them to the surrounding `jit`, and a step needs what a forward pass needs.
      key: fresh for each step; names the direction.
      learning_rate: of the step.
      epsilon: the distance of the two passes, about 1e-3.
      direction: `only(...)` moves adapters alone.

    Returns:
      New params and a `StepInfo`: log (key, info.scalar), and `replay` rebuilds the run.

    Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes (arXiv 2305.17333).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> step = jax.jit(lambda w, key: frugax.optim.mezo_step(
        ...     lambda w: jnp.sum(w**2), w, key, learning_rate=0.05, epsilon=1e-3), donate_argnums=0)
        >>> w = jnp.ones(4)
        >>> for key in jax.random.split(jax.random.key(0), 100):
        ...     w, info = step(w, key)
        >>> bool(info.loss < 0.1)
        True
    """
    return zo_step(
        loss_fn, params, key, learning_rate=learning_rate, estimator=two_point(epsilon), direction=direction
    )


def replay(
    params: Any,
    keys: Key[Array, "steps"],
    scalars: Float[Array, "steps"],
    *,
    epsilon: float | None = None,
    direction: Direction = gaussian,
) -> Any:
    """The parameters after a logged run, without data or forward passes.

    Args:
      params: those that the run began with.
      keys, scalars: of its steps, in order.
      epsilon: of `mezo_step`, to go there and back and round as it did; None for the other estimators.
      direction: of the run.

    Source: Malladi et al. 2023 (arXiv 2305.17333), section 2.1.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> w = frugax.optim.zeroth_order.replay(jnp.zeros(3), keys, jnp.array([0.1, -0.2]))
        >>> w.shape
        (3,)
    """

    def step(params, log):
        key, scalar = log
        offset = 0.0
        if epsilon is not None:
            params = displace(displace(params, key, epsilon, direction), key, -2 * epsilon, direction)
            offset = -epsilon
        return displace(params, key, scalar - offset, direction), None

    return jax.lax.scan(step, params, (keys, scalars))[0]


def zo_gradient(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    estimator: Estimator,
    samples: int = 1,
    direction: Direction = gaussian,
) -> tuple[Any, Float[Array, ""]]:
    """A gradient estimate for any Optax transformation: the mean of slope * direction over samples.

    With `optax.sgd` this is ZO-SGD, with `optax.sign_sgd` ZO-SGD-Sign, with momentum ZO-SGD-MMT, with
    `optax.adam` ZO-Adam.

    Args:
      loss_fn: params -> scalar.
      params: stay as they are.
      key: names the directions.
      estimator: `two_point(epsilon, in_place=False)` or `forward_gradient()`.
      samples: directions to average.
      direction: of each.

    Returns:
      A tree like params (zeros where the direction moves nothing) and the mean loss.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> g, loss = zo.zo_gradient(lambda w: w @ jnp.arange(3.0), jnp.ones(3), jax.random.key(0),
        ...                          estimator=zo.forward_gradient(), samples=4000)
        >>> bool(abs(g - jnp.arange(3.0)).max() < 0.25), round(float(loss), 3)
        (True, 3.0)
    """
    if samples < 1:
        raise ValueError(f"samples: got {samples}; expected at least 1")

    def add(total, key):
        gradient, loss = total
        found = estimator(loss_fn, params, key, direction)
        gradient = displace(gradient, key, found.slope / samples, direction)
        return (gradient, loss + found.loss / samples), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    if samples == 1:
        return add((zeros, 0.0), key)[0]
    return jax.lax.scan(add, (zeros, jnp.zeros(())), jax.random.split(key, samples))[0]


def conservative_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: float | Array,
    estimator: Estimator,
    direction: Direction = gaussian,
) -> tuple[Any, StepInfo]:
    """ZO-SGD-Cons: of the step, the step the other way and no step at all, the one with the least loss.

    Args:
      loss_fn, params, key, learning_rate, estimator, direction: as in `zo_step`; the estimator leaves params
        exactly where they are (`two_point(epsilon, in_place=False)` or `forward_gradient()`).

    Returns:
      New params and a `StepInfo`: `replay` works, since `scalar` is what was chosen.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592), after Bergou et al. 2020.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> f = lambda w: jnp.sum(w**2)
        >>> w, info = zo.conservative_step(f, jnp.ones(3), jax.random.key(0), learning_rate=100.0,
        ...                                estimator=zo.forward_gradient())
        >>> float(f(w)), float(info.scalar)  # either way is too far
        (3.0, 0.0)
    """
    found = estimator(loss_fn, params, key, direction)
    distance = -learning_rate * found.slope
    scalars = jnp.stack([jnp.zeros_like(distance), distance, -distance])
    turns = (scalars, opaque_copies(key, 3))
    losses = jax.lax.map(lambda turn: loss_fn(displaced_copy(params, turn[1], turn[0], direction)), turns)
    scalar = scalars[jnp.argmin(losses)]
    return displace(params, key, scalar, direction), StepInfo(losses[0], found.slope, scalar)
