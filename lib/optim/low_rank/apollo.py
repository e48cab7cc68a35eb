"""APOLLO: the raw gradient, scaled by how much Adam scales a random projection of it."""

from typing import Any

import optax

from ..common.chains import finish, static_size
from ..common.matrix_spec import MatrixSpec
from .low_rank import low_rank
from .named import make_projector
from .residuals import Scaled


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: Any = 200,
    scale: Any = 1.0,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    per: str = "column",
    limit: Any = 1.01,
    projector: str = "random",
    seed: Any = 0,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """APOLLO: W -= learning_rate * scale * G diag(s), s_j = |Adam(P G)_j| / |(P G)_j|, P random of `rank`
    rows.

    P is drawn again from (seed, step // update_interval) at each step, so it takes no memory. Adam's scale in
    `rank` dimensions is about sqrt(rank / m) of that in m; `scale` makes up for it, or the learning rate
    does.

    State, for a matrix of short side m and long side n: 4 * (2 r n + 2) bytes; for another leaf of size d:
    4 * (2 d + 1); and 4 for the count.

    Args:
      learning_rate: a number or a schedule.
      rank: of the projection; at most the projected side of every matrix.
      update_interval: steps from one P to the next.
      scale: of the matrices' updates; other leaves get plain Adam.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, as in `optax.adamw`.
      mask: which leaves decay, as in `optax.adamw`.
      per: "column" (of the long side) or "matrix".
      limit: how much a matrix's update may grow in norm from one step to the next, above a tenth of the
        norm that signs in the subspace would have (see `Scaled`).
      projector: "random" is the paper's; "svd" its variant with a basis that is found and kept.
      seed: of P.
      side: which side of a matrix is projected; "short" is the paper's.
      spec: which leaves are matrices.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Zhu et al. 2024 (arXiv 2412.05270), from its equations.

    Example:
        >>> import frugax, jax.numpy as jnp, optax
        >>> optimizer = frugax.optim.apollo(1e-2, rank=2)
        >>> params = {"kernel": jnp.ones((4, 6))}
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(params, state)
        >>> frugax.optim.state_bytes(state) == 4 * (2 * 2 * 6 + 2) + 4
        True
    """
    rule = low_rank(
        make_projector(projector, static_size("rank", rank)),
        optax.scale_by_adam(b1, b2, eps),
        Scaled(per, whole=True, limit=limit),
        scale=scale,
        spec=spec,
        side=side,
        refresh=update_interval,
        seed=seed,
    )
    return finish(rule, learning_rate, weight_decay, mask)


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 1,
    update_interval: Any = 200,
    scale: Any = 128**0.5,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    limit: Any = 1.01,
    seed: Any = 0,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """APOLLO-Mini: `apollo` at rank 1, with one scale a matrix and a fixed gain of sqrt(128).

    State, for a matrix of long side n: 4 * (2 n + 2) bytes; for another leaf of size d: 4 * (2 d + 1); and 4.

    Args: those of `apollo`.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Zhu et al. 2024 (arXiv 2412.05270), from its equations.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> state = frugax.optim.apollo_mini(1e-2).init({"kernel": jnp.ones((4, 6))})
        >>> frugax.optim.state_bytes(state) == 4 * (2 * 6 + 2) + 4
        True
    """
    return apollo(
        learning_rate,
        rank,
        update_interval,
        scale,
        b1,
        b2,
        eps,
        weight_decay,
        mask=mask,
        per="matrix",
        limit=limit,
        seed=seed,
        side=side,
        spec=spec,
    )
