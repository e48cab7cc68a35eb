"""Gradients of convex functions of a leaf of real or complex numbers, for `lion_k`."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array


def l1(u: Array) -> Array:
    """The gradient of the sum of magnitudes: the sign. Bounds every |W| by 1 / weight_decay."""
    return jnp.sign(u)


def l2(u: Array) -> Array:
    """The gradient of the leaf's Euclidean norm: its direction. Bounds |W|_2."""
    return u / _nonzero(jnp.sqrt(jnp.sum(_square(u))))


def group(u: Array) -> Array:
    """The gradient of the sum of column norms (columns along the last axis): each column's direction."""
    axes = tuple(range(u.ndim - 1)) if u.ndim < 3 else (-2,)
    return u / _nonzero(jnp.sqrt(jnp.sum(_square(u), axis=axes, keepdims=True)))


def lp(p: float) -> Callable[[Array], Array]:
    """Make the gradient of the leaf's p-norm, p > 1."""

    def gradient(u: Array) -> Array:
        size = jnp.abs(u) / _nonzero(jnp.max(jnp.abs(u)))  # in [0, 1]: its powers neither over- nor underflow
        return jnp.sign(u) * (size / _nonzero(jnp.sum(size**p) ** (1 / p))) ** (p - 1)

    return gradient


def huber(delta: float) -> Callable[[Array], Array]:
    """Make the gradient of the Huber function: u / delta where |u| < delta, the sign elsewhere."""
    return lambda u: u / jnp.maximum(jnp.abs(u), delta)


def _square(u: Array) -> Array:
    """|u|^2, also of complex numbers."""
    return jnp.real(u * jnp.conj(u))


def _nonzero(size: Array) -> Array:
    return jnp.where(size > 0, size, 1)
