"""The nearest orthogonal matrix, roughly, by matrix products alone."""

import jax.numpy as jnp
from jax import Array

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Array, steps: int = 5) -> Array:
    """U V^T of x = U S V^T [..., r, n], r <= n, up to singular values between 0.7 and 1.2; zeros stay zeros.

    Source: Muon, Jordan et al. 2024: the quintic a x + b (x x^T) x + c (x x^T)^2 x.
    """
    a, b, c = COEFFICIENTS
    size = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(size > 0, size, 1)
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x
