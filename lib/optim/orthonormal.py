"""Orthonormal columns of stacked matrices, without what makes a CPU's program stand still."""

import jax.numpy as jnp
from jax import Array, lax


def orthonormal(x: Array) -> Array:
    """Q of x = Q R for each of the matrices [..., m, r]; slice after slice on CPU.

    jaxlib hands a stack's slices to the threads that run the program's operations, of which its caller is
    one, and waits: where stacks of two leaves keep both of two threads waiting, nothing goes on.
    """
    if x.ndim == 2:
        return _q(x)
    stack = x.reshape(-1, *x.shape[-2:])
    q = lax.platform_dependent(stack, cpu=lambda stack: lax.map(_q, stack), default=_q)
    return q.reshape(*x.shape[:-2], *q.shape[-2:])


def _q(x: Array) -> Array:
    return jnp.linalg.qr(x)[0]
