"""BAdam: the layers one after the other, with moments for just one."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array, lax

from ..low_rank.projectors import Slices
from .lisa import layerwise


def badam(
    learning_rate: optax.ScalarOrSchedule,
    update_interval: Any = 100,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    layers: str = r"(^|/)layers/",
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """BAdam: AdamW on one of the stacked layers for `update_interval` steps, then on the next, from input up.

    Layers are the slices of axis 0 of the leaves that `layers` finds, as `nn.scan` stacks them. The others
    don't move, nor decay, and moments start anew with each layer. It is `lisa` with one active layer, drawn
    in order, and the other leaves frozen.

    State, for a stacked leaf of size d a layer: 4 * (2 d + 3) bytes; for another leaf: rest's; and 8 for two
    counts.

    Args:
      learning_rate: a number or a schedule.
      update_interval: steps a layer has.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, as in `optax.adamw`; of what moves.
      mask: which leaves decay, as in `optax.adamw`.
      layers: regex of the paths of stacked leaves.
      rest: the rule of the other leaves, such as `optax.scale_by_adam()` for a head that starts at random;
        None, the paper's, freezes embeddings and head.

    Returns:
      A drop-in for `optax.adamw`.

    Raises:
      ValueError: as `low_rank`: `layers` finds nothing.

    Source: Luo et al. 2024 (arXiv 2404.02827), with its ascending order.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"layers": {"kernel": jnp.ones((8, 4, 6))}, "embedding": jnp.ones((10, 4))}
        >>> state = frugax.optim.badam(1e-2).init(params)
        >>> frugax.optim.state_bytes(state) == 4 * (2 * 4 * 6 + 3) + 8
        True
    """
    of_layers, frozen = layerwise(_InTurn(1), update_interval, layers), optax.set_to_zero()
    return optax.chain(
        of_layers(optax.scale_by_adam(b1, b2, eps), "reset", frozen if rest is None else rest),
        optax.add_decayed_weights(weight_decay, mask),
        of_layers(optax.identity(), "keep", frozen if rest is None else optax.identity()),
        optax.scale_by_learning_rate(learning_rate),
    )


@dataclasses.dataclass(frozen=True)
class _InTurn(Slices):
    """One slice of a stack: the next one at each refresh. Keeps its number."""

    def init(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.full((), -1, jnp.int32)

    def refresh(self, g: Array, kept: Array, key: Any) -> Array:
        return (kept + 1) % g.shape[0]

    def down(self, g: Array, kept: Array, key: Any) -> Array:
        return lax.dynamic_slice_in_dim(g, kept, 1, axis=0)

    def up(self, r: Array, shape: tuple[int, ...], kept: Array, key: Any) -> Array:
        here = jnp.arange(shape[0]) == kept
        return jnp.where(here.reshape(-1, *[1] * (r.ndim - 1)), r, 0)
