"""One step of zeroth-order descent: parameters move along a random direction, which is named by its key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from .directions import Direction, check_moves, displace, gaussian, loss_along
from .estimators import Estimate, Estimator, opaque_copies, two_point


class StepInfo(NamedTuple):
    """The record of a step. Its key, `scalar` and `decay` are all that a replay needs."""

    loss: Float[Array, ""]  # before the step
    slope: Float[Array, ""]  # of the loss along the direction, clipped if asked for; NaN if not finite
    scalar: Float[Array, ""]  # how far along the direction the step went: -learning_rate * slope
    decay: Float[Array, ""]  # share by which the weights shrank: learning_rate * weight_decay

    @property
    def skipped(self) -> Bool[Array, ""]:
        """True where the slope was no finite number, and so no step was taken."""
        return jnp.isnan(self.slope)


Rate = float | Array | Callable[[Any], Any]


def zo_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: Rate,
    estimator: Estimator,
    direction: Direction = gaussian,
    clip: float | None = None,
    count: int | Int[Array, ""] | None = None,
    weight_decay: float | Array = 0.0,
    decays: Callable[[str], bool] | None = None,
) -> tuple[Any, StepInfo]:
    """(1 - learning_rate * weight_decay) params - learning_rate * slope * direction, by forward passes.

    Where the slope is not finite, because a loss is NaN or infinite, no step is taken: the parameters are
    those before it (to rounding, if the estimator moved them), and the record says `skipped`.

    Args:
      loss_fn: params -> scalar; needs no gradient under `two_point`.
      params: donate them to the surrounding `jit`: they are updated in place.
      key: fresh for each step; names the direction.
      learning_rate: of the step, or an Optax schedule of `count`.
      estimator: `two_point(epsilon)` or `forward_gradient()`.
      direction: `gaussian`, `only(...)` some leaves, `sparse(...)` or `random_subset(...)`.
      clip: the largest magnitude of a slope.
      count: steps done before this one; a schedule needs it.
      weight_decay: decoupled, as in `optax.adamw`. Weights that the direction leaves alone don't decay.
      decays: a leaf's path -> whether it decays; None: all that move.

    Returns:
      New params and a `StepInfo`.

    Raises:
      ValueError: the direction moves no leaf; a schedule without `count`; a loss that is no scalar; a key
        that is none of jax.random's.

    Source: Zhang et al. 2024, the ZO benchmark (arXiv 2402.11592).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> zo = frugax.optim.zeroth_order
        >>> step = jax.jit(lambda w, key: zo.zo_step(
        ...     lambda w: jnp.sum(w**2), w, key, learning_rate=0.05, estimator=zo.forward_gradient()))
        >>> w = jnp.ones(4)
        >>> for key in jax.random.split(jax.random.key(0), 100):
        ...     w, info = step(w, key)
        >>> bool(info.loss < 0.1)
        True
    """
    check_moves(params, key, direction)
    rate = rate_of(learning_rate, count)
    found = estimator(loss_fn, params, key, direction)
    info = taken(found.loss, found.slope, rate, clip, weight_decay)
    return moved_by(found, key, info, direction, weight_decay, decays), info


def rate_of(learning_rate: Rate, count: Any) -> float | Array:
    """The learning rate of step `count`."""
    if not callable(learning_rate):
        return learning_rate
    if count is None:
        raise ValueError("count: got None; expected the number of steps done: learning_rate is a schedule")
    return learning_rate(count)


def taken(
    loss: Array,
    slope: Array,
    rate: float | Array,
    clip: float | None = None,
    weight_decay: float | Array = 0.0,
) -> StepInfo:
    """The record of the step along `slope`: none, if that is not finite."""
    clipped = slope if clip is None else jnp.clip(slope, -clip, clip)
    scalar = jnp.asarray(-rate * clipped)
    finite = jnp.isfinite(slope) & jnp.isfinite(scalar)
    decay = jnp.where(finite, jnp.asarray(rate * weight_decay, scalar.dtype), 0.0)
    return StepInfo(loss, jnp.where(finite, clipped, jnp.nan), jnp.where(finite, scalar, 0.0), decay)


def moved_by(
    found: Estimate,
    key: Array,
    info: StepInfo,
    direction: Direction,
    weight_decay: float | Array = 0.0,
    decays: Callable[[str], bool] | None = None,
) -> Any:
    """The params after the step that `info` records, from where the estimator left them."""
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    decay = 0.0 if none else info.decay
    return displace(found.params, key, info.scalar, direction, back=-found.offset, decay=decay, decays=decays)


def mezo_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: Rate,
    epsilon: float,
    direction: Direction = gaussian,
    count: int | Int[Array, ""] | None = None,
    weight_decay: float | Array = 0.0,
    decays: Callable[[str], bool] | None = None,
) -> tuple[Any, StepInfo]:
    """MeZO: two forward passes at +-epsilon along a seeded direction, then a step along it, all in place.

    Floating and complex leaves move; where a loss is NaN or infinite no step is taken, and
    `info.skipped` says so.

    Args:
      loss_fn: params -> scalar, differentiable or not.
      params: donate them to the surrounding `jit`, and a step needs what a forward pass needs.
      key: fresh for each step; names the direction.
      learning_rate: of the step, or an Optax schedule of `count`.
      epsilon: the distance of the two passes, about 1e-3.
      direction: `only(...)` moves adapters alone.
      count, weight_decay, decays: as in `zo_step`. The authors' code leaves decay off biases and norms.

    Returns:
      New params and a `StepInfo`: log (key, info.scalar), and `replay` rebuilds the run.

    Raises:
      ValueError: as `zo_step`.

    Source: Malladi et al. 2023, Fine-Tuning Language Models with Just Forward Passes (arXiv 2305.17333).

    Example:
        >>> import frugax, jax, jax.numpy as jnp, optax
        >>> schedule = optax.linear_schedule(0.05, 0.01, 100)
        >>> step = jax.jit(lambda w, key, count: frugax.optim.mezo_step(
        ...     lambda w: jnp.sum(w**2), w, key, learning_rate=schedule, count=count, epsilon=1e-3,
        ...     weight_decay=0.1), donate_argnums=0)
        >>> w = jnp.ones(4)
        >>> for count, key in enumerate(jax.random.split(jax.random.key(0), 100)):
        ...     w, info = step(w, key, count)
        >>> bool(info.loss < 0.1), bool(info.skipped)
        (True, False)
    """
    return zo_step(
        loss_fn,
        params,
        key,
        learning_rate=learning_rate,
        estimator=two_point(epsilon),
        direction=direction,
        count=count,
        weight_decay=weight_decay,
        decays=decays,
    )


def replay(
    params: Any,
    keys: Key[Array, "steps"],
    scalars: Float[Array, "steps"],
    *,
    epsilon: float | None = None,
    direction: Direction = gaussian,
    decay: Float[Array, "steps"] | None = None,
    decays: Callable[[str], bool] | None = None,
    project: Callable[[Any], Any] | None = None,
) -> Any:
    """The parameters after a logged run, without data or forward passes.

    Args:
      params: those that the run began with.
      keys, scalars: of its steps, in order.
      epsilon: of `mezo_step`, to go there and back and round as it did; None for the other estimators.
      direction: of the run.
      decay: of its steps, from `StepInfo`; None for a run without weight decay.
      decays: of the run.
      project: params -> params after each step, such as `positive_scales`; None: none.

    Source: Malladi et al. 2023 (arXiv 2305.17333), section 2.1.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> w = frugax.optim.zeroth_order.replay(jnp.zeros(3), keys, jnp.array([0.1, -0.2]))
        >>> w.shape
        (3,)
    """

    def step(params, log):
        key, scalar, shrink = log
        offset = 0.0
        if epsilon is not None:
            params = displace(displace(params, key, epsilon, direction), key, -2 * epsilon, direction)
            offset = -epsilon
        shrink = 0.0 if decay is None else shrink
        params = displace(params, key, scalar, direction, back=-offset, decay=shrink, decays=decays)
        return params if project is None else project(params), None

    shrinks = jnp.zeros_like(scalars) if decay is None else decay
    return jax.lax.scan(step, params, (keys, scalars, shrinks))[0]


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
    `optax.adam` ZO-Adam. As of `jax.grad`, a complex leaf's is the conjugate of the direction to climb, and
    a loss that is not finite gives a gradient that is not: `optax.apply_if_finite` skips it.

    Args:
      loss_fn: params -> scalar.
      params: stay as they are.
      key: names the directions.
      estimator: `two_point(epsilon, in_place=False)` or `forward_gradient()`.
      samples: directions to average.
      direction: of each.

    Returns:
      A tree like params (zeros where the direction moves nothing) and the mean loss.

    Raises:
      ValueError: the direction moves no leaf; fewer than one sample.

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
    check_moves(params, key, direction)

    def add(total, key):
        gradient, loss = total
        found = estimator(loss_fn, params, key, direction)
        gradient = displace(gradient, key, found.slope / samples, direction)
        return (gradient, loss + found.loss / samples), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    if samples == 1:
        gradient, loss = add((zeros, 0.0), key)[0]
    else:
        gradient, loss = jax.lax.scan(add, (zeros, jnp.zeros(())), jax.random.split(key, samples))[0]
    return jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, gradient), loss


def conservative_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: Rate,
    estimator: Estimator,
    direction: Direction = gaussian,
    count: int | Int[Array, ""] | None = None,
) -> tuple[Any, StepInfo]:
    """ZO-SGD-Cons: of the step, the step the other way and no step at all, the one with the least loss.

    A loss that is not finite never wins.

    Args:
      loss_fn, params, key, learning_rate, estimator, direction, count: as in `zo_step`; the estimator leaves
        params exactly where they are (`two_point(epsilon, in_place=False)` or `forward_gradient()`).

    Returns:
      New params and a `StepInfo`: `replay` works, since `scalar` is what was chosen.

    Raises:
      ValueError: as `zo_step`.

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
    check_moves(params, key, direction)
    found = estimator(loss_fn, params, key, direction)
    info = taken(found.loss, found.slope, rate_of(learning_rate, count))
    scalars = jnp.stack([jnp.zeros_like(info.scalar), info.scalar, -info.scalar])
    turns = (scalars, opaque_copies(key, 3))
    losses = jax.lax.map(lambda turn: loss_along(loss_fn, params, turn[1], turn[0], direction), turns)
    scalar = scalars[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
    return displace(params, key, scalar, direction), info._replace(loss=losses[0], scalar=scalar)
