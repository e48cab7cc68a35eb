"""Random Hadamard rotations by block, which spread an outlier over its block."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Key


def hadamard_matrix(n: int) -> np.ndarray:
    """Build the orthogonal n x n matrix of +-1 / sqrt(n), for n a power of two (Sylvester's).

    Example:
        >>> (2 * hadamard_matrix(4)).astype(int).tolist()
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.float32(np.sqrt(n))


def rotation(n: int, key: Key[Array, ""] | None) -> Array:
    """Draw diag(signs) H, an orthogonal n x n matrix; without a key, always the same."""
    key = jax.random.key(0) if key is None else key
    return jax.random.rademacher(key, (n, 1), jnp.float32) * hadamard_matrix(n)


def rotate(blocks: Array, by: Array | None) -> Array:
    """Turn blocks [..., G, g] by an orthogonal matrix [g, g]; None leaves them."""
    return blocks if by is None else jnp.matmul(blocks, by, precision="highest")
