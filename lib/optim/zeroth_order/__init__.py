"""Training by forward passes alone: a step is a key and a scalar, and its direction is never stored.

`zo_step` is the loop that the methods share: an estimator finds the slope along a direction, and parameters
move along it in place. `mezo_step`, `sparse_mezo_step` and `qzo_step` are points of it.
"""

from .directions import displace, gaussian, only
from .distributed import distzo2_step, one_byte_step, replay_bytes
from .estimators import Estimate, forward_gradient, two_point
from .offload import Pending, zo2_flush, zo2_step
from .parts import blockwise_step, first_order_part, hybrid_step
from .qzo import positive_scales, qzo_step
from .sparse_mezo import (
    magnitude_densities,
    magnitude_thresholds,
    random_subset,
    sparse,
    sparse_mezo_step,
)
from .step import StepInfo, conservative_step, mezo_step, replay, zo_gradient, zo_step
from .subspace import history_subspace, partial_timesteps

__all__ = [
    "Estimate",
    "Pending",
    "StepInfo",
    "blockwise_step",
    "conservative_step",
    "displace",
    "distzo2_step",
    "first_order_part",
    "forward_gradient",
    "gaussian",
    "history_subspace",
    "hybrid_step",
    "magnitude_densities",
    "magnitude_thresholds",
    "mezo_step",
    "one_byte_step",
    "only",
    "partial_timesteps",
    "positive_scales",
    "qzo_step",
    "random_subset",
    "replay",
    "replay_bytes",
    "sparse",
    "sparse_mezo_step",
    "two_point",
    "zo2_flush",
    "zo2_step",
    "zo_gradient",
    "zo_step",
]
