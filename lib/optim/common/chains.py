"""Checks of optimizers' arguments, and the transformations that follow an update rule."""

from typing import Any

import jax
import numpy as np
import optax


def static_size(name: str, value: Any) -> int:
    """Check that `value`, which decides shapes, is an int >= 1."""
    if (
        isinstance(value, bool)
        or not hasattr(value, "__index__")
        or isinstance(value, jax.Array | np.ndarray)
    ):
        raise ValueError(
            f"{name}: got {value!r}; expected an int >= 1: it decides shapes. Under "
            f"optax.inject_hyperparams, name it in static_args=({name!r},)"
        )
    if int(value) < 1:
        raise ValueError(f"{name}: got {value}; expected an int >= 1")
    return int(value)


def finish(
    rule: optax.GradientTransformation, learning_rate: Any, weight_decay: Any, mask: Any
) -> optax.GradientTransformation:
    """Chain an update rule with decoupled weight decay and the learning rate, as in `optax.adamw`."""
    none = isinstance(weight_decay, int | float) and weight_decay == 0  # then the update needs no params
    decay = optax.identity() if none else optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(rule, decay, optax.scale_by_learning_rate(learning_rate))
