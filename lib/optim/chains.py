"""What the optimizers of this folder share: their arguments' checks, and what comes after the update rule."""

from typing import Any

import jax
import numpy as np
import optax

from . import projectors
from .projectors import Projector
from .random_basis import RandomBasis

PROJECTORS = {
    "svd": projectors.SVD,
    "gram": projectors.Gram,
    "randomized": projectors.RandomizedSVD,
    "power": projectors.PowerIteration,
    "dct": projectors.DCT,
    "random": projectors.Gaussian,
    "columns": projectors.Rows,
    "coordinates": projectors.Coordinates,
    "blocks": projectors.Slices,
}


def make_projector(name: str, rank: int | float, *, orthonormal: bool = False, **options: Any) -> Projector:
    """The projector that an optimizer's argument names; orthonormal for those that use what it leaves out."""
    if name not in PROJECTORS:
        raise ValueError(f"projector: got {name!r}; one of {', '.join(PROJECTORS)} fits")
    make = RandomBasis if orthonormal and name == "random" else PROJECTORS[name]
    return make(rank=rank, **options)


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
