"""Natural gradients from a short history: the empirical Fisher of the last few gradients, inverted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.chains import static_size
from ..common.matrix_spec import leaf_path
from ..common.slicewise import slicewise


class FisherState(NamedTuple):
    """Steps so far, and the last gradients: [..., history, r, n] for each leaf [..., r, n]."""

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

    Raises:
      ValueError: a leaf has fewer than two axes.

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
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            if x.ndim < 2:
                raise ValueError(f"params: got {list(x.shape)} at {leaf_path(path)}; expected [..., m, n]")
        past = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], size, *x.shape[-2:]), x.dtype), params)
        return FisherState(jnp.zeros((), jnp.int32), past)

    def update(updates: Any, state: FisherState, params: Any = None) -> tuple[Any, FisherState]:
        place = state.step % size

        def remember(h: Array, g: Array) -> Array:
            # A loop writes h in place. Alone, the update would be fused into each of its uses, with a copy of
            # all of h for each; and a loop of one turn is alone.
            write = lambda _, h: jax.lax.dynamic_update_index_in_dim(h, g, place, h.ndim - 3)  # noqa: E731
            return jax.lax.fori_loop(0, 2, write, h)

        def precondition(h: Array) -> Array:
            gram = slicewise(lambda h_SK: h_SK @ h_SK.T, h.reshape(*h.shape[:-2], -1))
            damped = gram + damping * jnp.eye(size, dtype=h.dtype).reshape(*[1] * (gram.ndim - 2), size, size)
            newest = jnp.zeros(size, h.dtype).at[place].set(1)
            weights = slicewise(lambda a: jnp.linalg.solve(a, newest), damped)
            return jnp.einsum("...i,...irn->...rn", weights, h)

        past = jax.tree.map(remember, state.history, updates)
        return jax.tree.map(precondition, past), FisherState(optax.safe_increment(state.step), past)

    return optax.GradientTransformation(init, update)
