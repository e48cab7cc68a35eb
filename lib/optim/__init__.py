"""Optax gradient transformations that keep little state.

`low_rank` composes the low-rank family from a projector (`projectors.py`), an inner transformation in the
subspace, a residual rule for the rest (`residuals.py`), a refresh schedule (`refresh.py`), and a `MatrixSpec`
that says which leaves are matrices. `galore`, `apollo` and others are compositions of these.
"""

from . import zeroth_order
from .common.leafwise import LeafwiseState
from .common.matrix_spec import STACKED, MatrixAxes, MatrixSpec
from .common.state_bytes import state_bytes
from .layerwise.active import active_value_and_grad
from .layerwise.badam import badam
from .layerwise.lisa import lisa
from .layerwise.slimfit import slimfit
from .layerwise.step import Layerwise, layerwise_step
from .low_bit.eight_bit import (
    EightBit,
    adafactor_8bit,
    adam_8bit,
    adamw_8bit,
    is_embedding,
    lion_8bit,
    scale_by_adam_8bit,
    sgdm_8bit,
)
from .low_bit.quantized import quantized_state
from .low_bit.stochastic_rounding import apply_updates_stochastic, round_stochastic
from .low_rank.apollo import apollo, apollo_mini
from .low_rank.cosmos import cosmos
from .low_rank.dct_adamw import dct_adamw
from .low_rank.fira import fira
from .low_rank.fisher import scale_by_fisher
from .low_rank.frugal import frugal
from .low_rank.galore import galore
from .low_rank.low_rank import low_rank
from .low_rank.natural_galore import natural_galore
from .low_rank.projectors import (
    DCT,
    SVD,
    Coordinates,
    Gaussian,
    Gram,
    PowerIteration,
    RandomizedSVD,
    Rows,
    Slices,
)
from .low_rank.q_galore import q_galore
from .low_rank.random_basis import RandomBasis
from .low_rank.refresh import Refresh
from .low_rank.residuals import SGD, Scaled, SignSGD
from .low_rank.trion import trion
from .sign import kappas
from .sign.lion_k import lion, lion_k, scale_by_lion_k
from .zeroth_order import mezo_step

Axes = MatrixAxes  # its name in earlier versions

__all__ = [
    "DCT",
    "SGD",
    "STACKED",
    "SVD",
    "Axes",
    "Coordinates",
    "EightBit",
    "Gaussian",
    "Gram",
    "Layerwise",
    "LeafwiseState",
    "MatrixAxes",
    "MatrixSpec",
    "PowerIteration",
    "RandomBasis",
    "RandomizedSVD",
    "Refresh",
    "Rows",
    "Scaled",
    "SignSGD",
    "Slices",
    "active_value_and_grad",
    "adafactor_8bit",
    "adam_8bit",
    "adamw_8bit",
    "apollo",
    "apollo_mini",
    "apply_updates_stochastic",
    "badam",
    "cosmos",
    "dct_adamw",
    "fira",
    "frugal",
    "galore",
    "is_embedding",
    "kappas",
    "layerwise_step",
    "lion",
    "lion_8bit",
    "lion_k",
    "lisa",
    "low_rank",
    "mezo_step",
    "natural_galore",
    "q_galore",
    "quantized_state",
    "round_stochastic",
    "scale_by_adam_8bit",
    "scale_by_fisher",
    "scale_by_lion_k",
    "sgdm_8bit",
    "slimfit",
    "state_bytes",
    "trion",
    "zeroth_order",
]
