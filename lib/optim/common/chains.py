"""What the optimizers of this folder share: their arguments' checks, and what comes after the update rule."""

from typing import Any

import jax
import numpy as np
import optax


def static_size(name: str, value: Any) -> int:
    """`value`, which decides shapes, as an int >= 1."""
    if (
        isinstance(value, bool)
        or not hasattr(value, "__index__")
        or isinstance(value, jax.Array | np.ndarray)
    ):
        raise ValueError(
            f"{name}: got {value!r}; an int >= 1 fits: it decides shapes. Under optax.inject_hyperparams, "
            f"name it in static_args=({name!r},)"
        )
    if int(value) < 1:
        raise ValueError(f"{name}: got {value}; an int >= 1 fits")
    return int(value)


def finish(
    rule: optax.GradientTransformation, learning_rate: Any, weight_decay: Any, mask: Any
) -> optax.GradientTransformation:
    """An update rule, then decoupled weight decay and the learning rate, as in `optax.adamw`."""
    none = isinstance(weight_decay, int | float) and weight_decay == 0  # then the update needs no params
    decay = optax.identity() if none else optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(rule, decay, optax.scale_by_learning_rate(learning_rate))
