"""Natural GaLore: GaLore, with natural gradients in the subspace."""

from typing import Any

import optax

from ..common.chains import finish, static_size
from ..common.matrix_spec import MatrixSpec
from .fisher import scale_by_fisher
from .low_rank import low_rank
from .named import make_projector
from .refresh import Refresh


def natural_galore(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    update_interval: Any = 200,
    scale: Any = 0.25,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-6,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    history: int = 20,
    damping: Any = 1e-3,
    projector: str = "gram",
    moments: str = "keep",
    stagger: bool = False,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """Natural GaLore: W -= learning_rate * scale * P Adam((damping I + H H^T)^-1 P^T G), H the last P^T G's.

    State, for a matrix of short side m and long side n: 4 * (m r + (2 + history) r n + 2) bytes; for another
    leaf of size d: 4 * (2 d + 1); and 4 for the count.

    Args:
      history: how many projected gradients H has, this step's included.
      damping: of the Fisher matrix. Large against the gradients' squared norms, this is GaLore; small, of
        gradients that hardly change only their differences count.
      learning_rate, rank, ... : those of `galore`.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Das 2024 (arXiv 2410.16029); history, damping and eps are the defaults of the author's code.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> state = frugax.optim.natural_galore(1e-2, rank=2, history=3).init({"w": jnp.ones((4, 6))})
        >>> frugax.optim.state_bytes(state) == 4 * (4 * 2 + (2 + 3) * 2 * 6 + 2) + 4
        True
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    rule = low_rank(
        make_projector(projector, static_size("rank", rank)),
        optax.chain(scale_by_fisher(history, damping), adam),
        plain=adam,
        scale=scale,
        spec=spec,
        side=side,
        refresh=Refresh(update_interval, stagger),
        moments=moments,
    )
    return finish(rule, learning_rate, weight_decay, mask)
