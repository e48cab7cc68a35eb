"""LISA: a few of the layers at a time, drawn at random, with moments for just those."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ..common.chains import static_size
from ..common.matrix_spec import STACKED, MatrixSpec
from ..low_rank.low_rank import low_rank
from ..low_rank.projectors import Projector, Slices
from .active import LAYERS, is_stacked
from .step import Layerwise


def lisa(
    learning_rate: optax.ScalarOrSchedule,
    active: int = 2,
    update_interval: Any = 20,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    *,
    mask: Any = None,
    layers: str = LAYERS,
    moments: str = "reset",
    seed: Any = 0,
) -> Layerwise:
    """LISA: AdamW on `active` of the stacked layers, drawn every `update_interval` steps, and on all else.

    Layers are the slices of axis 0 of the leaves that `layers` finds, as `nn.scan` stacks them; the same are
    active in all leaves. The others don't move, nor decay. Moments live in `active` slots, which pass to
    other layers at each draw. `layerwise_step` takes gradients of the active layers alone; with `jax.grad`
    they are taken of all.

    State, for a stacked leaf of size d a layer: 4 * (2 * active * d + 1) bytes; for another leaf of size d:
    4 * (2 d + 1); and 8 for two counts.

    Args:
      learning_rate: a number or a schedule.
      active: how many layers.
      update_interval: steps from one draw to the next.
      b1, b2, eps: Adam's.
      weight_decay: decoupled, as in `optax.adamw`.
      mask: which leaves decay, as in `optax.adamw`.
      layers: regex of the paths of stacked leaves.
      moments: at a draw; "keep" leaves a layer the moments of another, and is right where all are active.
      seed: of the draws.

    Returns:
      A drop-in for `optax.adamw`, and for `layerwise_step`.

    Raises:
      ValueError: as `low_rank`: `layers` finds nothing; more active layers than a leaf has.

    Source: Pan et al. 2024 (arXiv 2403.17919).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> params = {"layers": {"kernel": jnp.ones((8, 4, 6))}, "embedding": jnp.ones((10, 4))}
        >>> state = frugax.optim.lisa(1e-2, active=2).init(params)
        >>> frugax.optim.state_bytes(state) == 4 * (2 * 2 * 4 * 6 + 1) + 4 * (2 * 40 + 1) + 8
        True
    """
    slots = Slices(static_size("active", active))
    of_layers = layerwise(slots, update_interval, layers, seed)
    rule = optax.chain(
        of_layers(optax.scale_by_adam(b1, b2, eps), moments),
        optax.add_decayed_weights(weight_decay, mask),
        of_layers(optax.identity(), "keep"),  # the same draws: what is not active doesn't decay
        optax.scale_by_learning_rate(learning_rate),
    )

    def drawn(state: Any, params: Any) -> Array:
        count = depth(params, layers)
        turn = state[0].step // jnp.asarray(update_interval, jnp.int32)
        return slots.down(jnp.arange(count), (), jax.random.fold_in(jax.random.key(seed), turn))

    def init(params: Any) -> Any:
        if jax.tree.leaves(params):  # else a placeholder, by which Optax asks where params are in a state
            fewest = min(len(x) for x in _stacks(params, layers))
            if slots.rank > fewest:
                raise ValueError(f"active: got {active}; expected 1 to {fewest}, the layers of params")
        return rule.init(params)

    return Layerwise(optax.GradientTransformation(init, rule.update), drawn, layers)


def depth(params: Any, layers: str) -> int:
    """The number of stacked layers, the same in all leaves that `layers` finds."""
    found = sorted({len(x) for x in _stacks(params, layers)})
    if len(found) > 1:
        raise ValueError(f"params: got stacks of {found} layers; expected one number for all")
    return found[0]


def _stacks(params: Any, layers: str) -> list[Array]:
    pairs = zip(jax.tree.leaves(params), is_stacked(params, layers), strict=True)
    return [x for x, is_one in pairs if is_one]


def layerwise(
    slots: Projector, update_interval: Any, layers: str, seed: Any = 0
) -> Callable[..., optax.GradientTransformation]:
    """(inner, moments, plain) -> `inner` on the slices of stacked leaves that `slots` chooses, zero updates
    elsewhere; `plain` (None: inner) on the leaves that `layers` doesn't find."""
    spec = MatrixSpec(rules={layers: STACKED}, names="(?!)")  # no leaf is a matrix by its name

    def wrap(inner: optax.GradientTransformation, moments: str, plain: Any = None) -> Any:
        return low_rank(
            slots,
            inner,
            plain=plain,
            spec=spec,
            side="rows",
            refresh=update_interval,
            moments=moments,
            seed=seed,
        )

    return wrap
