"""Projectors by the names that optimizers' `projector` argument takes."""

from typing import Any

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
        raise ValueError(f"projector: got {name!r}; expected one of {', '.join(PROJECTORS)}")
    make = RandomBasis if orthonormal and name == "random" else PROJECTORS[name]
    return make(rank=rank, **options)
