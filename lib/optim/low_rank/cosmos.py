"""COSMOS: Adam in the leading eigenspace of the gradients' Gram matrix, Muon outside of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.chains import finish, static_size
from ..common.leafwise import Turn, leafwise
from ..common.matrix_spec import Decision, MatrixSpec, View
from ..common.newton_schulz import newton_schulz
from ..common.slicewise import eigenvectors, orthonormal


class CosmosLeaf(NamedTuple):
    """Momentum M [..., m, n], basis U [..., m, r], projected Gram S [..., r, r], moments V [..., r, n]."""

    mu: Array
    basis: Array
    gram: Array
    nu: Array


def cosmos(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    gamma: Any = 0.2,
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    nesterov: bool = True,
    mask: Any = None,
    adam_scale: Any = 1.0,
    ns_steps: int = 5,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """COSMOS: W -= learning_rate * sqrt(m) * X / |X|, X = A + gamma * B, for a gradient G [m, n].

    M = b1 M + (1 - b1) G;  N = (b1 M + (1 - b1) G) / (1 - b1^(t+1))
    C = b2 U S U^T + (1 - b2) G G^T;  U <- QR(C U);  S <- U^T C U
    V = b2 V + (1 - b2) (U^T G)^2
    A = U (U^T N) / sqrt((V + eps) / (1 - b2^t))
    B = sqrt(m n) Q / |Q|, Q = ortho(N - U U^T N) by Newton-Schulz

    U is on the short side here, and starts as the leading left singular vectors of the first G. Without
    Nesterov's look ahead, N = M / (1 - b1^t). At full rank there is no B.

    State, for a matrix of short side m and long side n: 4 * (m n + m r + r r + r n) bytes; for another leaf
    of size d: 4 * (2 d + 1); and 4 for the count.

    Args:
      learning_rate: a number or a schedule.
      rank: of the eigenspace; at most the projected side of every matrix.
      gamma: weight of the part outside of it.
      b1, b2, eps: the decays, and Adam's for leaves that are no matrices.
      weight_decay: decoupled, as in `optax.adamw`.
      nesterov: use the momentum as it would be after this gradient once more; False is the paper's text.
      mask: which leaves decay, as in `optax.adamw`.
      adam_scale: learning rate of leaves that are no matrices, over that of matrices.
      ns_steps: Newton-Schulz steps.
      side: which side of a matrix U is on; the authors' code has it on the inputs.
      spec: which leaves are matrices.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Liu et al. 2025 (arXiv 2502.17410), from its equations. Nesterov's form, the start and gamma 0.2
    are the defaults of the authors' code; b1 and b2 0.95 are those of its usage example.

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
        zeros = lambda *shape: jnp.zeros((*batch, *shape), dtype)  # noqa: E731
        return CosmosLeaf(zeros(m, n), zeros(m, r), zeros(r, r), zeros(r, n))

    def update(view: View, turn: Turn, g: Array, w: Array | None, state: CosmosLeaf):
        m, n = g.shape[-2:]
        r = state.basis.shape[-1]
        t = turn.step + 1
        mu = b1 * state.mu + (1 - b1) * g
        ahead = (b1 * mu + (1 - b1) * g) / (1 - b1 ** (t + 1)) if nesterov else mu / (1 - b1**t)
        last = jax.lax.cond(turn.step == 0, lambda: _leading(g, r), lambda: state.basis)
        grown = b2 * last @ state.gram + (1 - b2) * g @ (_t(g) @ last)  # C U, for U^T U = 1
        u = orthonormal(grown)
        turned, low = _t(u) @ last, _t(u) @ g
        gram = b2 * turned @ state.gram @ _t(turned) + (1 - b2) * low @ _t(low)
        nu = b2 * state.nu + (1 - b2) * low * low
        inside = _t(u) @ ahead
        total = u @ (inside / jnp.sqrt((nu + eps) / (1 - b2**t)))
        if r < m:
            rest = ahead - u @ inside
            rest = newton_schulz(rest, count) if m <= n else _t(newton_schulz(_t(rest), count))
            total = total + gamma * _of_norm((m * n) ** 0.5, rest)
        return _of_norm(m**0.5, total), CosmosLeaf(mu, u, gram, nu)

    plain = optax.chain(optax.scale_by_adam(b1, b2, eps), optax.scale(adam_scale))
    rule = leafwise(init, update, plain, spec, side)
    return finish(rule, learning_rate, weight_decay, mask)


def _leading(g: Array, r: int) -> Array:
    with jax.default_matmul_precision("highest"):  # the gradient is squared in here
        return eigenvectors(g @ _t(g))[..., :r]


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _of_norm(norm: float, x: Array) -> Array:
    size = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    return norm * x / jnp.where(size > 0, size, 1)
