"""Lion-K: momentum through the gradient of a convex function; with the l1 norm it is Lion."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.chains import finish
from . import kappas

KAPPAS = {"l1": kappas.l1, "l2": kappas.l2, "group": kappas.group}


class LionKState(NamedTuple):
    """The momentum, in float32."""

    mu: Any


def scale_by_lion_k(
    kappa: str | Callable[[Array], Array] = "l1", b1: Any = 0.9, b2: Any = 0.99
) -> optax.GradientTransformation:
    """u -> grad kappa(b1 M + (1 - b1) G), then M = b2 M + (1 - b2) G. State: 4 bytes a number.

    Args:
      kappa: the gradient of a convex function of a leaf, or "l1", "l2" or "group" (columns' norms); see
        `frugax.optim.kappas`.
      b1, b2: how much of the momentum goes into the update, and stays.

    Source: Chen et al. 2023 (arXiv 2310.05898).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> tx = frugax.optim.scale_by_lion_k()
        >>> g = jnp.array([3.0, -0.1, 0.0])
        >>> tx.update(g, tx.init(g))[0]
        Array([ 1., -1.,  0.], dtype=float32)
    """
    if isinstance(kappa, str) and kappa not in KAPPAS:
        expected = f"one of {', '.join(KAPPAS)}, or a function of a leaf"
        raise ValueError(f"kappa: got {kappa!r}; expected {expected}")
    gradient_of = KAPPAS[kappa] if isinstance(kappa, str) else kappa

    def init(params: Any) -> LionKState:
        return LionKState(jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), params))

    def update(updates: Any, state: LionKState, params: Any = None) -> tuple[Any, LionKState]:
        def mix(decay):
            return lambda m, g: decay * m + (1 - decay) * g.astype(m.dtype)

        out = jax.tree.map(lambda m, g: gradient_of(mix(b1)(m, g)).astype(g.dtype), state.mu, updates)
        return out, LionKState(jax.tree.map(mix(b2), state.mu, updates))

    return optax.GradientTransformation(init, update)


def lion_k(
    learning_rate: optax.ScalarOrSchedule,
    kappa: str | Callable[[Array], Array] = "l1",
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 1e-3,
    *,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Lion-K: W -= learning_rate * (grad kappa(b1 M + (1 - b1) G) + weight_decay W), M = b2 M + (1 - b2) G.

    With decay it minimizes loss(W) + kappa*(weight_decay W) / weight_decay, kappa* being kappa's conjugate:
    for a norm, the loss on the ball of its dual norm of radius 1 / weight_decay.

    State: 4 bytes a number.

    Args:
      learning_rate: a number or a schedule.
      kappa: see `scale_by_lion_k`.
      b1, b2: how much of the momentum goes into the update, and stays.
      weight_decay: decoupled.
      mask: which leaves decay, as in `optax.adamw`.

    Returns:
      A drop-in for `optax.lion`.

    Source: Chen et al. 2023 (arXiv 2310.05898).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> optimizer = frugax.optim.lion_k(1e-3, kappa="l2")
        >>> frugax.optim.state_bytes(optimizer.init(jnp.ones(10)))
        40
    """
    return finish(scale_by_lion_k(kappa, b1, b2), learning_rate, weight_decay, mask)


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    weight_decay: Any = 1e-3,
    *,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Lion: W -= learning_rate * (sign(b1 M + (1 - b1) G) + weight_decay W), M = b2 M + (1 - b2) G.

    `optax.lion` with a float32 momentum whatever the params' dtype. State: 4 bytes a number.

    Args: those of `lion_k`.

    Returns:
      A drop-in for `optax.lion`.

    Source: Chen et al. 2023 (arXiv 2302.06675).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> optimizer, w = frugax.optim.lion(0.5, weight_decay=0.0), jnp.array([2.0])
        >>> optimizer.update(w, optimizer.init(w), w)[0]
        Array([-0.5], dtype=float32)
    """
    return lion_k(learning_rate, "l1", b1, b2, weight_decay, mask=mask)


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
