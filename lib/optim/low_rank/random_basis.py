"""A random orthonormal basis: for rules that also move along what the projection leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from ..common.slicewise import orthonormal
from .projectors import _Basis


@dataclasses.dataclass(frozen=True)
class RandomBasis(_Basis):
    """A random subspace, all equally likely, whatever the gradient is. Keeps m * r numbers a matrix.

    Its projection is orthogonal: G is P P^T G and the rest, and the two don't overlap. `Gaussian` keeps
    nothing and suits APOLLO, which only asks for norms; but its P P^T G is no part of G, it is larger than G
    by sqrt(m / r), and what a residual rule got to see would be mostly noise.

    Source: the random semi-orthogonal projection of FRUGAL, Zmushko et al. 2024 (arXiv 2411.07837).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> p, g, key = frugax.optim.RandomBasis(rank=2), jnp.ones((4, 5)), jax.random.key(0)
        >>> kept = p.refresh(g, p.init(g.shape, g.dtype), key)
        >>> part = p.up(p.down(g, kept, key), g.shape, kept, key)
        >>> bool(abs(jnp.vdot(part, g - part)) < 1e-5)
        True
    """

    def find(self, g: Array, p: Array, key: Array) -> Array:
        if self.rank == 0:
            return p
        basis = orthonormal(jax.random.normal(key, p.shape[-2:], p.dtype))
        return jnp.broadcast_to(basis, p.shape)
