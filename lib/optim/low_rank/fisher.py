"""Natural gradients from a short history: the empirical Fisher of the last few gradients, inverted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.chains import static_size
from ..common.slicewise import slicewise


class FisherState(NamedTuple):
    """Steps so far, and the last gradients, each leaf [history, *its shape]."""

    step: Array
    history: Any


def scale_by_fisher(history: int = 20, damping: Any = 1e-3) -> optax.GradientTransformation:
    """g -> (damping I + H H^T)^-1 g, where H's columns are the last `history` gradients, this one included.

    A solve of `history` unknowns: g is a column of H, and (damping I + H H^T)^-1 H is H times
    (damping I + H^T H)^-1. Woodbury's identity, (g - H (damping I + H^T H)^-1 H^T g) / damping, is the same
    and loses all digits where damping is small. The last two axes of a leaf are a matrix; each matrix has a
    Fisher of its own.

    State: 4 * history bytes a number, and 4.

    Args:
      history: how many gradients.
      damping: positive; large against the gradients' squared norms, it leaves their direction as it is.

    Source: Natural GaLore, Das 2024 (arXiv 2410.16029); the defaults are those of the author's code.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> tx = frugax.optim.scale_by_fisher(history=1, damping=2.0)
        >>> g = jnp.array([[3.0, 0.0]])
        >>> round(float(tx.update(g, tx.init(g))[0][0, 0]), 4)  # 3 / (2 + 3 * 3)
        0.2727
    """
    size = static_size("history", history)

    def init(params: Any) -> FisherState:
        zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), params)
        return FisherState(jnp.zeros((), jnp.int32), zeros)

    def update(updates: Any, state: FisherState, params: Any = None) -> tuple[Any, FisherState]:
        place = state.step % size
        remember = lambda h, g: h.at[place].set(g)  # noqa: E731
        past = jax.tree.map(remember, state.history, updates)

        def precondition(g: Array, h: Array) -> Array:
            gram = jnp.einsum("i...rn,j...rn->...ij", h, h)
            newest = jnp.zeros(size, g.dtype).at[place].set(1)
            damped = gram + damping * jnp.eye(size, dtype=g.dtype)
            weights = slicewise(lambda a: jnp.linalg.solve(a, newest), damped)
            return jnp.einsum("...i,i...rn->...rn", weights, h)

        return jax.tree.map(precondition, updates, past), FisherState(optax.safe_increment(state.step), past)

    return optax.GradientTransformation(init, update)
