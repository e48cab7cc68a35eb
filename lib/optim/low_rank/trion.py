"""Trion: orthogonalized momentum of low rank, in a subspace of cosines."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from ..common.chains import finish, static_size
from ..common.leafwise import Turn, leafwise
from ..common.matrix_spec import Decision, MatrixSpec, View
from ..common.newton_schulz import newton_schulz
from .projectors import DCT


class TrionLeaf(NamedTuple):
    """The momentum [..., m, n], with what the last steps left out of their updates still in it."""

    mu: Array


def trion(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    momentum: Any = 0.95,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    adam_scale: Any = 1.0,
    ns_steps: int = 5,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """Trion: B = M + G; b = D_i^T B; M = B - (1 - momentum) D_i b; W -= learning_rate * f * D_i ortho(b).

    D_i are the `rank` cosines of the largest |D^T B| (Euclidean, which loses the least of B), chosen at each
    step and not kept; ortho is five Newton-Schulz steps; f = max(1, sqrt(outputs / inputs)) of a kernel
    [inputs, outputs].

    State, for a matrix [m, n]: 4 * m n bytes; for another leaf of size d: 4 * (2 d + 1); and 4 for the count.

    Args:
      learning_rate: a number or a schedule.
      rank: at most the projected side of every matrix.
      momentum: the share of b that stays in M.
      b1, b2, eps: Adam's, for leaves that are no matrices.
      weight_decay: decoupled, as in `optax.adamw`.
      mask: which leaves decay, as in `optax.adamw`.
      adam_scale: learning rate of leaves that are no matrices, over that of matrices.
      ns_steps: Newton-Schulz steps.
      side: which side of a matrix is projected.
      spec: which leaves are matrices, and which of their axes is the input, on which f depends.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Modoranu et al. 2025 (arXiv 2505.17967); the momentum is that of Dion (2504.05295). Momentum 0.95
    is the default of the authors' code, f one of the gains that it offers.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> state = frugax.optim.trion(1e-2, rank=2).init({"kernel": jnp.ones((4, 6))})
        >>> frugax.optim.state_bytes(state) == 4 * 4 * 6 + 4
        True
    """
    spec, size, count = spec or MatrixSpec(), static_size("rank", rank), static_size("ns_steps", ns_steps)

    def init(decision: Decision, dtype: Any) -> TrionLeaf:
        shape = decision.view.matrices
        spec.rank(size, shape[-2], decision.view, decision.path)
        return TrionLeaf(jnp.zeros(shape, dtype))

    def update(view: View, turn: Turn, g: Array, w: Array | None, state: TrionLeaf):
        m, n = g.shape[-2:]
        p = DCT(spec.rank(size, m, view))
        total = state.mu + g
        kept = p.choose(total)
        low = p.down(total, kept, None)
        mu = total - (1 - momentum) * p.up(low, g.shape, kept, None)
        outputs, inputs = (m, n) if view.swapped else (n, m)
        gain = max(1.0, (outputs / inputs) ** 0.5)
        tall = low.shape[-2] > low.shape[-1]
        low = jnp.swapaxes(low, -1, -2) if tall else low
        low = newton_schulz(low, count)
        low = jnp.swapaxes(low, -1, -2) if tall else low
        return gain * p.up(low, g.shape, kept, None), TrionLeaf(mu)

    plain = optax.chain(optax.scale_by_adam(b1, b2, eps), optax.scale(adam_scale))
    rule = leafwise(init, update, plain, spec, side)
    return finish(rule, learning_rate, weight_decay, mask)
