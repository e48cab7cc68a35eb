"""The operands of a low-bit product, rounded by block along the contracted axis, and the way back."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

from ...formats import Element
from ...kernels.common.arguments import accumulator
from .hadamard import rotate, rotation
from .quantizer import quantize_blocks, quantizer_vjp
from .recipe import Recipe


class How(NamedTuple):
    """The settings that the three products of a call share.

    Attributes:
      recipe: the options.
      turn: the rotation of blocks [g, g], or None.
      dtype: of operands: bfloat16 where x has it and it holds their values, else float32.
      sums: of sums: float32, or float64 if an operand is.
    """

    recipe: Recipe
    turn: Array | None
    dtype: jnp.dtype
    sums: jnp.dtype


class Operand(NamedTuple):
    """A matrix as `matrix` [R, K'] * outer, whose last axis is contracted."""

    matrix: Array
    outer: Array | float


def how(recipe: Recipe, x: Array, w: Array, key: Key[Array, ""] | None) -> How:
    """Settle what the products of x and w share."""
    turn = rotation(recipe.block_size, key) if recipe.hadamard and recipe.block_size else None
    sums = accumulator(x.dtype, w.dtype)
    # An element times a float32 scale has more digits than bfloat16, and so has a block that is turned alone.
    turned_alone = turn is not None and recipe.forward is None
    exact = recipe.block_size is None or (recipe.scale != "float32" and not turned_alone)
    dtype = jnp.dtype(jnp.bfloat16) if x.dtype == jnp.bfloat16 and exact else sums
    return How(recipe, turn, dtype, sums)


def turned(how: How, a: Float[Array, "R K"]) -> Float[Array, "R G g"]:
    """Cut rows in blocks, filled up by zeros, and turn each; float32."""
    size = how.recipe.block_size or a.shape[1]
    a = jnp.pad(a.astype(jnp.float32), ((0, 0), (0, -a.shape[1] % size)))
    return rotate(a.reshape(a.shape[0], -1, size), how.turn)


def operand(
    how: How,
    a: Float[Array, "R K"],
    element: Element | None,
    largest: Array | None,
    key: Key[Array, ""] | None = None,
) -> Operand:
    """Turn and round a matrix along its rows; without an element format it is turned alone."""
    if element is None and how.turn is None:
        return Operand(a.astype(how.dtype), 1.0)
    q = Operand(turned(how, a), 1.0)
    if element is not None:
        rounded = quantize_blocks(q.matrix, element, how.recipe, key=key, largest=largest)
        q = Operand(rounded.inner, rounded.outer)
    return Operand(q.matrix.reshape(a.shape[0], -1).astype(how.dtype), q.outer)


def product(how: How, a: Operand, b: Operand) -> Array:
    """a [R, K] times the transpose of b [S, K], in the dtype of sums."""
    return jnp.matmul(a.matrix, b.matrix.T, preferred_element_type=how.sums) * (a.outer * b.outer)


def pull_back(
    how: How,
    a: Float[Array, "R K"],
    gradient: Float[Array, "R L"],
    element: Element | None,
    largest: Array | None,
    *,
    is_turned: bool,
) -> Float[Array, "R K"]:
    """From a gradient of the forward operand to that of `a`: f'(a R) applied to it, turned back.

    Args:
      how: what the products share.
      a: the matrix that was turned by R and rounded by f.
      gradient: of the operand, filled up to whole blocks; or, not `is_turned`, as if nothing had been turned.
      element: of f; None: nothing was rounded.
      largest: as `operand` had it.
      is_turned: the gradient is in the turned coordinates.
    """
    recipe = how.recipe
    straight = recipe.rounding_gradient == "straight_through" and not recipe.scale_gradient
    is_identity = element is None or straight
    rows, n = a.shape
    if is_identity and (how.turn is None or not is_turned):
        return gradient[:, :n]
    size = recipe.block_size or n
    blocks = gradient.reshape(rows, -1, size) if is_turned else turned(how, gradient)
    if element is not None and not is_identity:
        blocks = quantizer_vjp(turned(how, a), blocks.astype(jnp.float32), element, recipe, largest=largest)
    return rotate(blocks, None if how.turn is None else how.turn.T).reshape(rows, -1)[:, :n]
