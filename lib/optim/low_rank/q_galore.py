"""Q-GaLore: GaLore with an int4 projector, 8-bit moments, and fewer refreshes where the subspace rests."""

from typing import Any

import optax

from ..common.chains import finish, static_size
from ..common.matrix_spec import MatrixSpec
from ..low_bit.quantized import quantized_state
from .low_rank import low_rank
from .named import make_projector
from .refresh import Refresh


def q_galore(
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
    threshold: Any = 0.4,
    queue: int = 5,
    projector: str = "gram",
    format: str = "int4",
    group_size: int = 256,
    min_size: int = 4096,
    side: str = "short",
    spec: MatrixSpec | None = None,
) -> optax.GradientTransformation:
    """Q-GaLore: `galore` with P in int4, moments in 8 bits, and intervals that double while P is stable.

    The paper's INT8 weights are params of `frugax.formats.QuantizedTensor`: take gradients of
    `.dequantize()`d ones, init and update with those, and add updates with `apply_updates_stochastic`.

    State, for a matrix of short side m and long side n, where groups of g = group_size divide both:
    m r / 2 + 4 r m / g bytes of P, 2 r n + 8 r n / g of moments (8 r n where r n < min_size), 4 (2 + queue)
    for its schedule, and 4 for the leaf; for another leaf of size d: 2 d + 8 d / g + 4 (8 d + 4 where
    d < min_size); and 4.

    Args:
      threshold, queue: see `Refresh`.
      format: P's number format.
      group_size: how many numbers share a scale.
      min_size: arrays of moments with fewer numbers stay in float32.
      learning_rate, rank, ... : those of `galore`.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`.

    Source: Zhang et al. 2024 (arXiv 2407.08296) and its code: a mean cosine of 40 % over the last 5 refreshes
    doubles the interval, at each refresh where it still holds. Differs: the sign of a vector, which is free,
    is not part of its cosine, and the last vector is the one that was stored, in int4; these codes are
    symmetric, where those of the paper have a zero point.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> optimizer = frugax.optim.q_galore(1e-2, rank=64)
        >>> state = jax.eval_shape(optimizer.init, {"kernel": jnp.ones((256, 512))})
        >>> p, moments, when = 256 * 64 // 2 + 4 * 64, 2 * (64 * 512 + 4 * 64 * 2) + 4, 4 * (2 + 5)
        >>> frugax.optim.state_bytes(state) == p + moments + when + 4
        True
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    group_size, min_size = static_size("group_size", group_size), static_size("min_size", min_size)
    formats = {"mu": "dynamic8", "nu": "udynamic8"}
    rule = low_rank(
        make_projector(projector, static_size("rank", rank), format=format, group_size=group_size),
        quantized_state(adam, formats, group_size=group_size, min_size=min_size),
        scale=scale,
        spec=spec,
        side=side,
        refresh=Refresh(update_interval, threshold=threshold, queue=queue),
    )
    return finish(rule, learning_rate, weight_decay, mask)
