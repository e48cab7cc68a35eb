"""Fira: GaLore, with what lies outside the subspace scaled as Adam scales what lies inside."""

from typing import Any

import optax

from ..common.chains import finish, static_size
from ..common.matrix_spec import MatrixSpec
from .low_rank import low_rank
from .named import make_projector
from .refresh import Refresh
from .residuals import Scaled


def fira(
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
    limit: Any = 1.01,
    projector: str = "gram",
    moments: str = "keep",
    stagger: bool = False,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """Fira: W -= learning_rate * scale * (P Adam(R) + (G - P R) diag(s)), s_j = |Adam(R)_j| / |R_j|.

    P are the top `rank` left singular vectors of G, and R = P^T G.

    State, for a matrix of short side m and long side n: 4 * (m r + 2 r n + 2) bytes; for another leaf of size
    d: 4 * (2 d + 1); and 4 for the count.

    Args:
      limit: how much the residual part of a matrix may grow in norm from one step to the next.
      learning_rate, rank, ... : those of `galore`.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Chen et al. 2024 (arXiv 2410.01623). The authors' code applies `scale` to the part in the subspace
    alone, W -= learning_rate * (scale * P Adam(R) + (G - scale * P R) diag(s)); here both
    parts weigh the same.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> state = frugax.optim.fira(1e-2, rank=2).init({"kernel": jnp.ones((4, 6))})
        >>> frugax.optim.state_bytes(state) == 4 * (4 * 2 + 2 * 2 * 6 + 2) + 4
        True
    """
    rule = low_rank(
        make_projector(projector, static_size("rank", rank), orthonormal=True),
        optax.scale_by_adam(b1, b2, eps),
        Scaled("column", limit=limit),
        scale=scale,
        spec=spec,
        side=side,
        refresh=Refresh(update_interval, stagger),
        moments=moments,
    )
    return finish(rule, learning_rate, weight_decay, mask)
