"""FRUGAL: Adam on a changing share of each matrix, signSGD on the rest of it."""

from typing import Any

import optax

from ..common.chains import finish, static_size
from ..common.matrix_spec import MatrixSpec
from .low_rank import low_rank
from .named import make_projector
from .residuals import SGD, SignSGD

RESIDUALS = {"sign": SignSGD, "sgd": SGD}


def frugal(
    learning_rate: optax.ScalarOrSchedule,
    rank: int | None = None,
    update_interval: Any = 200,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    density: float = 0.25,
    projector: str = "columns",
    residual: str = "sign",
    residual_scale: Any = 1.0,
    moments: str = "reset",
    seed: Any = 0,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """FRUGAL: W -= learning_rate * (up(Adam(down(G))) + residual_scale * sign(G - up(down(G)))).

    What Adam sees is drawn again from (seed, step // update_interval); the update has full rank at any
    density.

    State, for a matrix of short side m and long side n, with r = rank or density * m: 4 * (2 r n + 1) bytes;
    "blocks" of L stacked matrices: 4 * (2 r m n + 1), with r = rank or density * L; "svd", "random": 4 m r
    more.
    For another leaf of size d: 4 * (2 d + 1); and 4 for the count.

    Args:
      learning_rate: a number or a schedule.
      rank: rows of the projection; None: `density` of the projected side, which differs by matrix.
      update_interval: steps from one draw to the next.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, as in `optax.adamw`.
      mask: which leaves decay, as in `optax.adamw`.
      density: 0 is signSGD, 1 is Adam.
      projector: "columns", "coordinates", "blocks" (whole matrices of a stack), "random" (a basis,
        orthonormal), "svd", ...
      residual: "sign" or "sgd".
      residual_scale: the residual's learning rate over Adam's.
      moments: at a new draw; "reset" is the paper's, see `low_rank`.
      seed: of the draws.
      side: which side of a matrix is projected.
      spec: which leaves are matrices.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`; a density that is no share; "blocks" of leaves that are no stacks.

    Source: Zmushko et al. 2024 (arXiv 2411.07837).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> optimizer = frugax.optim.frugal(1e-2, density=0.5)
        >>> state = optimizer.init({"kernel": jnp.ones((4, 6))})
        >>> frugax.optim.state_bytes(state) == 4 * (2 * 2 * 6 + 1) + 4
        True
    """
    if residual not in RESIDUALS:
        raise ValueError(f"residual: got {residual!r}; expected one of {', '.join(RESIDUALS)}")
    if not isinstance(density, int | float) or not 0 <= density <= 1:
        raise ValueError(
            f"density: got {density!r}; expected a number from 0 to 1: it decides shapes. Under "
            "optax.inject_hyperparams, name it in static_args=('density',)"
        )
    rule = low_rank(
        make_projector(
            projector, float(density) if rank is None else static_size("rank", rank), orthonormal=True
        ),
        optax.scale_by_adam(b1, b2, eps),
        RESIDUALS[residual](residual_scale),
        spec=spec,
        side=side,
        refresh=update_interval,
        moments=moments,
        seed=seed,
    )
    return finish(rule, learning_rate, weight_decay, mask)
