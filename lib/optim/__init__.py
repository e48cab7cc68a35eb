"""Optax gradient transformations that keep little state.

`low_rank` is the composition: a projector (`projectors.py`), an inner transformation in the subspace, a
residual rule for the rest (`residuals.py`), a refresh schedule (`refresh.py`), and a `MatrixSpec` that says
which leaves are matrices. `galore`, `apollo` and their kin are points of it.
"""

from . import kappas, zeroth_order
from .apollo import apollo, apollo_mini
from .badam import badam
from .cosmos import cosmos
from .dct_adamw import dct_adamw
from .eight_bit import (
    EightBit,
    adafactor_8bit,
    adam_8bit,
    adamw_8bit,
    is_embedding,
    lion_8bit,
    scale_by_adam_8bit,
    sgdm_8bit,
)
from .fira import fira
from .fisher import scale_by_fisher
from .frugal import frugal
from .galore import galore
from .leafwise import LeafwiseState
from .lion_k import lion, lion_k, scale_by_lion_k
from .lisa import lisa
from .low_rank import low_rank
from .matrix_spec import STACKED, Axes, MatrixSpec
from .natural_galore import natural_galore
from .projectors import DCT, SVD, Coordinates, Gaussian, Gram, PowerIteration, RandomizedSVD, Rows, Slices
from .q_galore import q_galore
from .quantized import quantized_state
from .random_basis import RandomBasis
from .refresh import Refresh
from .residuals import SGD, Scaled, SignSGD
from .slimfit import slimfit
from .state_bytes import state_bytes
from .stochastic_rounding import apply_updates_stochastic, round_stochastic
from .trion import trion
from .zeroth_order import mezo_step

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
    "LeafwiseState",
    "MatrixSpec",
    "PowerIteration",
    "RandomBasis",
    "RandomizedSVD",
    "Refresh",
    "Rows",
    "Scaled",
    "SignSGD",
    "Slices",
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
