"""BAdam: the layers one after the other, with moments for just one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from ..low_rank.projectors import Slices
from .active import LAYERS
from .lisa import depth, layerwise
from .step import Layerwise

ORDERS = ("ascending", "descending", "random")


def badam(
    learning_rate: optax.ScalarOrSchedule,
    update_interval: Any = 100,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    layers: str = LAYERS,
    rest: optax.GradientTransformation | None = None,
    order: str = "ascending",
    seed: Any = 0,
) -> Layerwise:
    """BAdam: AdamW on one of the stacked layers for `update_interval` steps, then on the next.

    Layers are the slices of axis 0 of the leaves that `layers` finds, as `nn.scan` stacks them. The others
    don't move, nor decay, and moments start anew with each layer. It is `lisa` with one active layer, drawn
    in order, and the other leaves frozen. `layerwise_step` takes the gradient of that layer alone.

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
      order: of the layers: "ascending" from the input up, "descending", or "random": a new permutation for
        each round of all layers (random reshuffling).
      seed: of the permutations.

    Returns:
      A drop-in for `optax.adamw`, and for `layerwise_step`.

    Raises:
      ValueError: as `low_rank`: `layers` finds nothing; `order` is unknown.

    Source: Luo et al. 2024 (arXiv 2404.02827), with the orders of its code.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"layers": {"kernel": jnp.ones((8, 4, 6))}, "embedding": jnp.ones((10, 4))}
        >>> state = frugax.optim.badam(1e-2).init(params)
        >>> frugax.optim.state_bytes(state) == 4 * (2 * 4 * 6 + 3) + 8
        True
    """
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}; expected one of {', '.join(ORDERS)}")
    slots, frozen = _InTurn(1, order, seed), optax.set_to_zero()
    of_layers = layerwise(slots, update_interval, layers)
    rule = optax.chain(
        of_layers(optax.scale_by_adam(b1, b2, eps), "reset", frozen if rest is None else rest),
        optax.add_decayed_weights(weight_decay, mask),
        of_layers(optax.identity(), "keep", frozen if rest is None else optax.identity()),
        optax.scale_by_learning_rate(learning_rate),
    )

    def current(state: Any, params: Any) -> Array:
        turn = state[0].step // jnp.asarray(update_interval, jnp.int32)
        return slots.layer(turn, depth(params, layers))[None]

    return Layerwise(rule, current, layers)


@dataclasses.dataclass(frozen=True)
class _InTurn(Slices):
    """One slice of a stack: the next one at each refresh. Keeps the number of refreshes before this one."""

    order: str = "ascending"
    seed: Any = 0

    def layer(self, turn: Array, count: int) -> Array:
        """The layer of a turn; each has one turn in a round of `count`."""
        if self.order == "random":
            key = jax.random.fold_in(jax.random.key(self.seed), turn // count)
            return jax.random.permutation(key, count)[turn % count].astype(jnp.int32)
        return turn % count if self.order == "ascending" else count - 1 - turn % count

    def init(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.full((), -1, jnp.int32)

    def refresh(self, g: Array, kept: Array, key: Any) -> Array:
        return kept + 1

    def down(self, g: Array, kept: Array, key: Any) -> Array:
        return lax.dynamic_slice_in_dim(g, self.layer(kept, g.shape[0]), 1, axis=0)

    def up(self, r: Array, shape: tuple[int, ...], kept: Array, key: Any) -> Array:
        here = jnp.arange(shape[0]) == self.layer(kept, shape[0])
        return jnp.where(here.reshape(-1, *[1] * (r.ndim - 1)), r, 0)
