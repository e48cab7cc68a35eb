"""COSMOS: Adam in the leading eigenspace of the gradients' Gram matrix, Muon outside of it."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from ..common.chains import finish, static_size
from ..common.leafwise import Turn, leafwise
from ..common.matrix_spec import Decision, MatrixSpec, View
from ..common.newton_schulz import newton_schulz
from ..common.slicewise import orthonormal


class CosmosLeaf(NamedTuple):
    """Momentum M [..., m, n], basis U [..., m, r], projected Gram S [..., r, r], moments V [..., r, n]."""

    mu: Array
    basis: Array
    gram: Array
    nu: Array


def cosmos(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    gamma: Any = 0.25,
    b1: Any = 0.9,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    adam_scale: Any = 1.0,
    ns_steps: int = 5,
    seed: Any = 0,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """COSMOS: W -= learning_rate * sqrt(m) * X / |X|, X = A + gamma * B, for a gradient G [m, n].

    M = b1 M + (1 - b1) G;  C = b2 U S U^T + (1 - b2) G G^T;  U <- QR(C U);  S <- U^T C U
    V = b2 V + (1 - b2) (U^T G)^2
    A = U (U^T M / (1 - b1^t)) / sqrt((V + eps) / (1 - b2^t))
    B = sqrt(m n) Q / |Q|, Q = ortho(M - U U^T M) by Newton-Schulz

    U is on the short side here, and starts as a random orthonormal basis. At full rank there is no B.

    State, for a matrix of short side m and long side n: 4 * (m n + m r + r r + r n) bytes; for another leaf
    of size d: 4 * (2 d + 1); and 4 for the count.

    Args:
      learning_rate: a number or a schedule.
      rank: of the eigenspace; at most the projected side of every matrix.
      gamma: weight of the part outside of it.
      b1, b2, eps: the decays, and Adam's for leaves that are no matrices.
      weight_decay: decoupled, as in `optax.adamw`.
      mask: which leaves decay, as in `optax.adamw`.
      adam_scale: learning rate of leaves that are no matrices, over that of matrices.
      ns_steps: Newton-Schulz steps.
      seed: of U's start.
      side: which side of a matrix U is on.
      spec: which leaves are matrices.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Liu et al. 2025 (arXiv 2502.17410), from its equations. b1 and b2 are those of the authors' usage
    example; gamma's default is ours.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> state = frugax.optim.cosmos(1e-2, rank=2).init({"kernel": jnp.ones((4, 6))})
        >>> frugax.optim.state_bytes(state) == 4 * (4 * 6 + 4 * 2 + 2 * 2 + 2 * 6) + 4
        True
    """
    spec, size, count = spec or MatrixSpec(), static_size("rank", rank), static_size("ns_steps", ns_steps)

    def init(decision: Decision, dtype: Any) -> CosmosLeaf:
        *batch, m, n = decision.view.matrices
        r = spec.rank(size, m, decision.view, decision.path)
        key = jax.random.fold_in(jax.random.key(seed), np.uint32(zlib.crc32(decision.path.encode())))
        start = orthonormal(jax.random.normal(key, (m, r), dtype))
        zeros = lambda *shape: jnp.zeros((*batch, *shape), dtype)  # noqa: E731
        return CosmosLeaf(zeros(m, n), zeros(m, r) + start, zeros(r, r), zeros(r, n))

    def update(view: View, turn: Turn, g: Array, w: Array | None, state: CosmosLeaf):
        m, n = g.shape[-2:]
        t = turn.step + 1
        mu = b1 * state.mu + (1 - b1) * g
        grown = b2 * state.basis @ state.gram + (1 - b2) * g @ (_t(g) @ state.basis)  # C U, for U^T U = 1
        u = orthonormal(grown)
        turned, low = _t(u) @ state.basis, _t(u) @ g
        gram = b2 * turned @ state.gram @ _t(turned) + (1 - b2) * low @ _t(low)
        nu = b2 * state.nu + (1 - b2) * low * low
        low_mu = _t(u) @ mu
        total = u @ (low_mu / (1 - b1**t) / jnp.sqrt((nu + eps) / (1 - b2**t)))
        if u.shape[-1] < m:
            rest = mu - u @ low_mu
            rest = newton_schulz(rest, count) if m <= n else _t(newton_schulz(_t(rest), count))
            total = total + gamma * _of_norm((m * n) ** 0.5, rest)
        return _of_norm(m**0.5, total), CosmosLeaf(mu, u, gram, nu)

    plain = optax.chain(optax.scale_by_adam(b1, b2, eps), optax.scale(adam_scale))
    rule = leafwise(init, update, plain, spec, side)
    return finish(rule, learning_rate, weight_decay, mask)


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _of_norm(norm: float, x: Array) -> Array:
    size = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return norm * x / jnp.where(size > 0, size, 1)
