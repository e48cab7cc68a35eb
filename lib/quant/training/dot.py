"""The matrix product of low-bit training: each of its three products rounds both operands by block."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from ...kernels.common.arguments import reject
from .operands import how as _how
from .operands import operand, product, pull_back
from .recipe import Recipe, element, recipe_named


class AmaxHistory(NamedTuple):
    """Largest magnitudes of the last steps, newest first, float32 [history] each; zeros where there are none.

    Attributes:
      x, w, gradient: of activations, weights, and the output's gradient.
    """

    x: Any
    w: Any
    gradient: Any


def init_history(recipe: Recipe | str) -> AmaxHistory:
    """Make the empty history of a product with delayed scaling.

    Example:
        >>> import frugax
        >>> frugax.quant.training.init_history("fp8_delayed").x.shape
        (1024,)
    """
    n = recipe_named(recipe).history
    return AmaxHistory(*(jnp.zeros(n, jnp.float32) for _ in range(3)))


def low_bit_dot(
    x: Float[Array, "*b K"],
    w: Float[Array, "K N"],
    recipe: Recipe | str,
    *,
    key: Key[Array, ""] | None = None,
    history: AmaxHistory | None = None,
) -> Float[Array, "*b N"]:
    """Multiply as a low-bit training step does: x w, and both products of the backward pass, in few bits.

    Each product rounds its operands in blocks along its own contracted axis: K here, N for the gradient of x,
    and the tokens (all leading axes of x) for that of w. Rounding is simulated: values are those of the
    formats, products are bfloat16 (for bfloat16 x) or float32, and sums are float32.

    Args:
      x: activations.
      w: weights.
      recipe: what is rounded, and how; a `Recipe` or its name.
      key: fresh at every step. By it gradients are rounded at random (`stochastic`), and the signs of
        `hadamard` are drawn; without a key they are always the same.
      history: of delayed scaling, which the recipe asks for by its `history`. Its gradient is not a gradient,
        but the next history: `grads, history = jax.grad(loss, (0, 1))(params, history)`.

    Returns:
      The product in x's dtype. A block that holds a NaN or an infinity is NaN.

    Raises:
      ValueError: shapes or dtypes don't fit, a history is missing or too many, or a gradient is to be rounded
        at random without a key.

    Source: Hu et al. 2025 (arXiv 2509.17791); delayed scaling as in Micikevicius et al. 2022 (2209.05433) and
    NVIDIA's Transformer Engine, but that the first step scales by its own largest magnitudes.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 64), (64, 8)]))
        >>> y = frugax.quant.training.low_bit_dot(x, w, "nvfp4")
        >>> bool(jnp.std(y - x @ w) < 0.2 * jnp.std(x @ w))
        True
        >>> loss = lambda w: frugax.quant.training.low_bit_dot(x, w, "nvfp4", key=jax.random.key(0)).sum()
        >>> jax.grad(loss)(w).shape
        (64, 8)
    """
    recipe = recipe_named(recipe)
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        reject("x", x, "a floating array [..., K]")
    if w.ndim != 2 or w.shape[0] != x.shape[-1] or not jnp.issubdtype(w.dtype, jnp.floating):
        reject("w", w, f"a floating array [{x.shape[-1]}, N] for x of shape {list(x.shape)}")
    if (history is None) != (recipe.history == 0):
        got = "None" if history is None else "a history"
        raise ValueError(
            f"history: got {got}; expected {'one' if history is None else 'None'} for a recipe with "
            f"history={recipe.history}"
        )
    if history is not None and any(leaf.shape != (recipe.history,) for leaf in history):
        shapes = [leaf.shape for leaf in history]
        raise ValueError(f"history: got arrays of shapes {shapes}; expected ({recipe.history},)")
    y = _dot(recipe, x.reshape(-1, x.shape[-1]), w, key, history)
    return y.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(recipe: Recipe, x: Array, w: Array, key: Array | None, history: AmaxHistory | None) -> Array:
    """x [M, K] times w [K, N]."""
    return _forward(recipe, x, w, key, history)[0]


def _forward(recipe, x, w, key, history):
    how, of = _how(recipe, x, w, key), element(recipe.forward)
    largest = _largest(history, x=x, w=w)
    y = product(how, operand(how, x, of, largest["x"]), operand(how, w.T, of, largest["w"]))
    return y.astype(x.dtype), (x, w, key, history)


def _backward(recipe, kept, dy):
    x, w, key, history = kept
    how, of = _how(recipe, x, w, key), element(recipe.forward)
    largest = _largest(history, x=x, w=w, gradient=dy)
    at_x, at_w, at_dy = largest["x"], largest["w"], largest["gradient"]
    follows = recipe.gradient is None  # then these are the derivatives of the product that ran
    if follows:
        dx = _times(how, dy, operand(how, w.T, of, at_w))
        dw_t = _times(how, dy.T, operand(how, x, of, at_x))
    else:
        if recipe.stochastic and key is None:
            raise ValueError("key: got None; expected a PRNG key, by which gradients are rounded")
        keys = jax.random.split(jax.random.fold_in(key, 1)) if recipe.stochastic else (None, None)
        of_dy = element(recipe.gradient)
        dx = product(how, operand(how, dy, of_dy, at_dy, keys[0]), operand(how, w, of, at_w))
        dw_t = product(how, operand(how, dy.T, of_dy, at_dy, keys[1]), operand(how, x.T, of, at_x))
    dx = pull_back(how, x, dx, of, at_x, is_turned=follows)
    dw_t = pull_back(how, w.T, dw_t, of, at_w, is_turned=follows)
    return dx.astype(x.dtype), dw_t.T.astype(w.dtype), None, _next_history(history, x=x, w=w, gradient=dy)


_dot.defvjp(_forward, _backward)


def _times(how, a: Array, b) -> Array:
    """a [R, S], as it is, times the operand b [S, K]."""
    return jnp.matmul(a.astype(how.dtype), b.matrix, preferred_element_type=how.sums) * b.outer


def _amax(a: Array) -> Array:
    return jnp.max(jnp.abs(a.astype(jnp.float32)))


def _largest(history: AmaxHistory | None, **arrays: Array) -> dict[str, Array | None]:
    """For each array the largest magnitude that its history has, or its own where that is empty."""
    if history is None:
        return dict.fromkeys(arrays)
    past = {name: jnp.max(getattr(history, name)) for name in arrays}
    return {name: jnp.where(past[name] > 0, past[name], _amax(a)) for name, a in arrays.items()}


def _next_history(history: AmaxHistory | None, **arrays: Array) -> AmaxHistory | None:
    """The history with this step in front. A step that is not finite says nothing: it repeats the largest."""
    if history is None:
        return None

    def after(past: Array, now: Array) -> Array:
        now = jnp.where(jnp.isfinite(now), now, jnp.max(past))
        return jnp.concatenate([now[None], past[:-1]])

    return AmaxHistory(**{name: after(getattr(history, name), _amax(a)) for name, a in arrays.items()})
