"""Lyapunov exponents of a recurrence, which forgets or amplifies a disturbance, by Jacobian products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Step = Callable[[Any, Any], Any]  # (state, what one token brings) -> next state


def log_growth(step: Step, state: Any, inputs: Any, key: Array) -> Array:
    """Log of how much each token stretches a disturbance that has gone through all tokens before it.

    v_t = J_t v_{t-1} / |v_{t-1}|, where J_t is the Jacobian of `step` at token t, as a Jacobian-vector
    product: no matrix is made. The mean of log |v_t| tends to the maximal Lyapunov exponent.

    Args:
      step: the one-step map; differentiable forward (of `frugax.kernels`, backends "reference" and "xla").
      state: the first state, a tree of floats.
      inputs: a tree of arrays [T, ...].
      key: of the first disturbance, which is random.

    Returns:
      log |v_t| [T]; -inf from where on the disturbance is gone for good.

    Raises:
      ValueError: a leaf of the state is not of floats.

    Example:
        >>> halve = lambda x, _: x / 2
        >>> growth = log_growth(halve, jnp.ones(3), jnp.zeros(4), jax.random.key(0))
        >>> [round(float(g), 3) for g in growth]
        [-0.693, -0.693, -0.693, -0.693]
    """
    leaves, tree = jax.tree.flatten(state)
    if not leaves or not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        got = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves)
        raise ValueError(f"state: got {got}; expected a tree of floating arrays")
    keys = jax.random.split(key, len(leaves))
    v = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    v, _ = _normalize(jax.tree.unflatten(tree, v))

    def follow(carry, token):
        state, v = carry
        state, v = jax.jvp(lambda s: step(s, token), (state,), (v,))
        v, norm = _normalize(v)
        return (state, v), jnp.log(norm)

    return jax.lax.scan(follow, (state, v), inputs)[1]


def max_lyapunov_exponent(step: Step, state: Any, inputs: Any, key: Array, *, burn_in: int = 0) -> Array:
    """The maximal Lyapunov exponent of a state map along one trajectory: log growth a token.

    lim 1/T log |J_T ... J_1|: below 0, two states that differ slightly come together, and what rounding
    does to a state is forgotten; above 0, they part.

    Args:
      step, state, inputs, key: as in `log_growth`.
      burn_in: tokens at the start whose growth doesn't count: the disturbance has yet to turn to where it
        lasts longest, so that its growth there is below the exponent.

    Returns:
      A scalar: the mean growth after `burn_in` tokens.

    Raises:
      ValueError: burn_in leaves no token, or the state is not of floats.

    Source: Benettin et al. 1980's renormalised tangent; Halloran et al. 2024 (arXiv 2406.00209) for Mamba.

    Example:
        >>> logistic = lambda x, _: 4 * x * (1 - x)  # chaotic, with exponent log 2
        >>> exponent = max_lyapunov_exponent(logistic, jnp.float32(0.3), jnp.zeros(5000), jax.random.key(0))
        >>> round(float(exponent), 1)
        0.7
    """
    T = jax.tree.leaves(inputs)[0].shape[0]
    if not 0 <= burn_in < T:
        raise ValueError(f"burn_in: got {burn_in}; expected 0 to {T - 1} for {T} tokens")
    return jnp.mean(log_growth(step, state, inputs, key)[burn_in:])


def precision_gap(step: Step, state: Any, inputs: Any, dtype: DTypeLike) -> Array:
    """Distance of a trajectory whose states are kept in `dtype` from the one that isn't rounded.

    Args:
      step, state, inputs: as in `log_growth`; `step` computes in whatever it computes in.
      dtype: what states and inputs are rounded to at each token.

    Returns:
      |rounded state - state| [T], in the units of the state.

    Example:
        >>> decay = lambda x, b: 0.9 * x + b
        >>> gap = precision_gap(decay, jnp.zeros(5), jnp.ones(1000), jnp.bfloat16)
        >>> bool(gap[500:].max() < 1)  # of states near 10
        True
    """

    def round_to(tree):
        return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), tree)

    def follow(carry, token):
        state, low = carry
        state = step(state, token)
        low = round_to(step(low, round_to(token)))
        return (state, low), _norm(jax.tree.map(jnp.subtract, low, state))

    return jax.lax.scan(follow, (state, round_to(state)), inputs)[1]


def _norm(tree: Any) -> Array:
    """The 2-norm of a whole tree, without squares that overflow or vanish."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]))
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(sum(jnp.sum((x / unit) ** 2) for x in jax.tree.leaves(tree)))


def _normalize(tree: Any) -> tuple[Any, Array]:
    norm = _norm(tree)
    return jax.tree.map(lambda x: x / jnp.where(norm > 0, norm, 1).astype(x.dtype), tree), norm
