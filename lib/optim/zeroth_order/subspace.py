"""ZOODiP's subspace gradient: where the parameters have been says which parts of an estimate are noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class SubspaceState(NamedTuple):
    """Steps done; for each leaf of d numbers its last values and the directions kept, [window, d] each."""

    count: Int[Array, ""]  # type: ignore[assignment]  # a tuple's method, as in optax's states
    history: Any
    kept: Any


def history_subspace(window: int, variance: float) -> optax.GradientTransformation:
    """Project estimates onto the main directions of the parameters' last `window` values.

    Every `window` steps the principal components of the values since are found, and those that explain the
    share `variance` of their variance span the subspace for the next `window` steps. The first `window` steps
    are not projected.

    Args:
      window: values remembered for each leaf: meant for a token embedding, not for a model.
      variance: in (0, 1]; the smaller, the fewer directions remain.

    Returns:
      A transformation to chain before a learning rate; its update needs params. State: 8 * window bytes for
      each number.

    Source: Seo et al. 2025, Efficient Personalization of Quantized Diffusion Model without Backpropagation
    (arXiv 2503.14868). Their sampling of timesteps is the caller's: it is `jax.random.randint` over a range.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> tx = frugax.optim.zeroth_order.history_subspace(window=2, variance=0.9)
        >>> state = tx.init(jnp.zeros(2))
        >>> for token in ([0.0, 0.0], [1.0, 0.0], [2.0, 0.0]):  # it moves along the first axis alone
        ...     g, state = tx.update(jnp.ones(2), state, jnp.array(token))
        >>> g.round(3).tolist()
        [1.0, 0.0]
    """
    if window < 2:
        raise ValueError(f"window: got {window}; at least 2 fits")
    if not 0 < variance <= 1:
        raise ValueError(f"variance: got {variance}; (0, 1] fits")

    def init(params):
        blank = lambda x: jnp.zeros((window, x.size), jnp.float32)  # noqa: E731
        return SubspaceState(
            jnp.zeros((), jnp.int32), jax.tree.map(blank, params), jax.tree.map(blank, params)
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: got None; the values whose history is kept fit")
        history = jax.tree.map(
            lambda h, x: h.at[state.count % window].set(x.ravel().astype(jnp.float32)), state.history, params
        )
        projected = jax.tree.map(
            lambda g, v: jnp.where(state.count < window, g, _project(g, v)), updates, state.kept
        )
        count = optax.safe_increment(state.count)
        kept = jax.lax.cond(count % window == 0, lambda: jax.tree.map(_main, history), lambda: state.kept)
        return projected, SubspaceState(count, history, kept)

    def _main(values: Float[Array, "w d"]) -> Float[Array, "w d"]:
        _, sizes, directions = jnp.linalg.svd(values - values.mean(0), full_matrices=False)
        share = jnp.cumsum(sizes**2) / jnp.maximum(jnp.sum(sizes**2), jnp.finfo(jnp.float32).tiny)
        wanted = jnp.concatenate([jnp.zeros(1), share[:-1]]) < variance  # up to the one that reaches it
        rows = jnp.where(wanted[:, None], directions, 0.0)
        return jnp.zeros_like(values).at[: len(rows)].set(rows)

    return optax.GradientTransformation(init, update)


def _project(g: Array, directions: Float[Array, "w d"]) -> Array:
    flat = g.ravel().astype(jnp.float32)
    return ((directions @ flat) @ directions).reshape(g.shape).astype(g.dtype)
