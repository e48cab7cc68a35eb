"""GaLore: Adam in the leading singular subspace of each matrix's gradient."""

from typing import Any

import optax

from ..common.chains import finish, static_size
from ..common.matrix_spec import MatrixSpec
from .low_rank import low_rank
from .named import make_projector
from .refresh import Refresh


def galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: Any = 200,
    scale: Any = 0.25,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    projector: str = "gram",
    moments: str = "keep",
    stagger: bool = False,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """GaLore: W -= learning_rate * scale * P Adam(P^T G), P the top `rank` left singular vectors of G.

    State, for a matrix of short side m and long side n: 4 * (m r + 2 r n + 1) bytes; for another leaf of size
    d: 4 * (2 d + 1); and 4 for the count.

    Args:
      learning_rate: a number or a schedule.
      rank: of the subspace; at most the projected side of every matrix.
      update_interval: steps from one P to the next.
      scale: of the matrices' updates; other leaves get plain Adam.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, as in `optax.adamw`.
      mask: which leaves decay, as in `optax.adamw`.
      projector: "gram" and "svd" find the paper's vectors, the first much faster; "randomized" and
        "power" come close to them; see `projectors.py`.
      moments: at a refresh; "keep" is the paper's, see `low_rank`.
      stagger: spread the refreshes of leaves over the interval.
      side: which side of a matrix is projected; "short" is the paper's.
      spec: which leaves are matrices.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Zhao et al. 2024 (arXiv 2403.03507).

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> optimizer = frugax.optim.galore(1e-2, rank=2, update_interval=50)
        >>> params = {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state, params)
        >>> frugax.optim.state_bytes(state) == 4 * (4 * 2 + 2 * 2 * 6 + 1) + 4 * (2 * 6 + 1) + 4
        True
    """
    rule = low_rank(
        make_projector(projector, static_size("rank", rank)),
        optax.scale_by_adam(b1, b2, eps),
        scale=scale,
        spec=spec,
        side=side,
        refresh=Refresh(update_interval, stagger),
        moments=moments,
    )
    return finish(rule, learning_rate, weight_decay, mask)
