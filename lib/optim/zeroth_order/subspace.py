"""ZOODiP's subspace gradient: parameters' past moves tell which parts of an estimate are noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key


class SubspaceState(NamedTuple):
    """Steps done; for each leaf of d numbers its last values and the directions removed, [window, d] each."""

    count: Int[Array, ""]  # type: ignore[assignment]  # a tuple's method, as in optax's states
    history: Any
    removed: Any


def history_subspace(window: int, variance: float) -> optax.GradientTransformation:
    """Remove from estimates the directions along which the parameters' last `window` values hardly moved.

    Every `window` steps the principal components of the values since are found. The largest, which together
    explain the share `variance`, are trusted; the others, along which steps cancelled each other, are noise,
    and estimates lose them for the next `window` steps. What lies outside of all of them, where nothing moved
    and nothing is known, stays: so the parameters aren't bound to where they have been. Nothing is removed in
    the first `window` steps.

    Args:
      window: values remembered for each leaf: meant for a token embedding, not for a model.
      variance: in (0, 1]; the smaller, the more directions are removed. 1 removes none.

    Returns:
      A transformation to chain before a learning rate; its update needs params. State: 8 * window bytes for
      each number, and 4.

    Source: Seo et al. 2025, Efficient Personalization of Quantized Diffusion Model without Backpropagation
    (arXiv 2503.14868), where 1 - variance is nu. The authors' code divides each coordinate of the values by
    its spread before it looks for components; here they are those of the values.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> tx = frugax.optim.zeroth_order.history_subspace(window=3, variance=0.9)
        >>> state = tx.init(jnp.zeros(3))
        >>> for token in ([0.0, 0.0, 0.0], [1.0, 0.1, 0.0], [2.0, 0.0, 0.0], [3.0, 0.0, 0.0]):
        ...     g, state = tx.update(jnp.ones(3), state, jnp.array(token))
        >>> abs(g).round(3).tolist()  # forwards along the first axis, to and fro along the second
        [1.0, 0.0, 1.0]
    """
    if window < 2:
        raise ValueError(f"window: got {window}; expected at least 2")
    if not 0 < variance <= 1:
        raise ValueError(f"variance: got {variance}; expected a share in (0, 1]")

    def init(params):
        blank = lambda x: jnp.zeros((window, x.size), jnp.float32)  # noqa: E731
        return SubspaceState(
            jnp.zeros((), jnp.int32), jax.tree.map(blank, params), jax.tree.map(blank, params)
        )

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("params: got None; expected the params, to keep a history of them")
        if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(params)):
            raise ValueError("params: got complex leaves; expected floats")
        history = jax.tree.map(
            lambda h, x: h.at[state.count % window].set(x.ravel().astype(jnp.float32)), state.history, params
        )
        projected = jax.tree.map(
            lambda g, v: jnp.where(state.count < window, g, _without(g, v)), updates, state.removed
        )
        count = optax.safe_increment(state.count)
        removed = jax.lax.cond(
            count % window == 0, lambda: jax.tree.map(_noise, history), lambda: state.removed
        )
        return projected, SubspaceState(count, history, removed)

    def _noise(values: Float[Array, "w d"]) -> Float[Array, "w d"]:
        _, sizes, directions = jnp.linalg.svd(values - values.mean(0, keepdims=True), full_matrices=False)
        share = jnp.cumsum(sizes**2) / jnp.maximum(jnp.sum(sizes**2), jnp.finfo(jnp.float32).tiny)
        trusted = jnp.concatenate([jnp.zeros(1), share[:-1]]) < variance  # up to the one that reaches it
        moved = sizes > sizes[0] * max(values.shape) * jnp.finfo(jnp.float32).eps  # the rest is rounding
        rows = jnp.where((moved & ~trusted)[:, None], directions, 0.0)
        return jnp.zeros_like(values).at[: len(rows)].set(rows)

    return optax.GradientTransformation(init, update)


def partial_timesteps(
    key: Key[Array, ""], shape: tuple[int, ...], *, steps: int = 1000, low: float = 0.5, high: float = 0.9
) -> Int[Array, "*shape"]:
    """Draw diffusion timesteps from the part in which a text's condition matters.

    They are uniform over round(low * steps) to round(high * steps) - 1, of timesteps 0 to steps - 1 from the
    least noise to the most. Outside of that part a token's gradient is mostly noise.

    Args:
      key: fresh for each step.
      shape: of the result, such as (batch,).
      steps: timesteps of the diffusion.
      low, high: the part's ends, as shares; 0.5 and 0.9 are the authors'.

    Raises:
      ValueError: the part is empty or not inside of [0, 1].

    Source: Seo et al. 2025 (arXiv 2503.14868), partial uniform timestep sampling.

    Example:
        >>> import frugax, jax
        >>> t = frugax.optim.zeroth_order.partial_timesteps(jax.random.key(0), (64,))
        >>> bool((t >= 500).all()), bool((t < 900).all())
        (True, True)
    """
    first, end = round(low * steps), round(high * steps)
    if not 0 <= low < high <= 1 or first == end:
        raise ValueError(f"low, high: got {low} and {high} of {steps} steps; expected a part of [0, 1]")
    return jax.random.randint(key, shape, first, end)


def _without(g: Array, directions: Float[Array, "w d"]) -> Array:
    flat = g.ravel().astype(jnp.float32)
    return (flat - (directions @ flat) @ directions).reshape(g.shape).astype(g.dtype)
