"""Work on stacks of matrices: one after the other on a CPU, at once elsewhere."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax


def slicewise(
    work: Callable[[Array], Array], x: Array, elsewhere: Callable[[Array], Array] | None = None
) -> Array:
    """`work` of each of the matrices x [..., m, n]; one after the other on a CPU.

    jaxlib 0.10 and 0.11.0 hand a stack's factorizations to the threads that run the program's operations,
    of which the caller is one, and wait: where the stacks of two leaves keep both of two threads waiting,
    nothing goes on. Slice after slice takes no longer: the factorization of one matrix has threads of its
    own, and its products fit the caches.

    Args:
      work: of one matrix.
      x: the stack.
      elsewhere: the same by other means, for TPUs and GPUs; None: `work`.
    """
    if x.ndim == 2 and elsewhere is None:
        return work(x)
    stack = x.reshape(-1, *x.shape[-2:])
    done = lax.platform_dependent(stack, cpu=partial(lax.map, work), default=jax.vmap(elsewhere or work))
    return done.reshape(*x.shape[:-2], *done.shape[1:])


def orthonormal(x: Array) -> Array:
    """Q of x = Q R for each of the matrices [..., m, r]."""
    return slicewise(lambda x_MR: jnp.linalg.qr(x_MR)[0], x)


def eigenvectors(x: Array) -> Array:
    """The eigenvectors of symmetric matrices [..., m, m], those of the largest eigenvalues first."""
    return slicewise(lambda x_MM: jnp.linalg.eigh(x_MM)[1], x)[..., ::-1]  # eigh sorts upwards


def left_singular_vectors(x: Array) -> Array:
    """U of x = U S V^T for each of the matrices [..., m, n]: [..., m, min(m, n)]."""
    return slicewise(lambda x_MN: jnp.linalg.svd(x_MN, full_matrices=False)[0], x)
