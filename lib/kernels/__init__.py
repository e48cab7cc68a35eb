"""Pure array functions, one folder per operation; Pallas lives here and nowhere else."""

from .causal_conv1d import causal_conv1d
from .common.explain import explain
from .grouped_matmul import grouped_matmul
from .linear_attention import linear_attention
from .linear_recurrence import linear_recurrence
from .lmu import lmu
from .quantized_matmul import MixedActivations, quantized_matmul
from .quantized_update import quantized_update
from .rnn import rnn
from .selective_scan import selective_scan
from .selective_scan_2d import merge_paths_2d, paths_2d, selective_scan_2d
from .ssd import ssd
from .trapezoidal_ssd import TrapezoidalState, trapezoidal_ssd

__all__ = [
    "MixedActivations",
    "TrapezoidalState",
    "causal_conv1d",
    "explain",
    "grouped_matmul",
    "linear_attention",
    "linear_recurrence",
    "lmu",
    "merge_paths_2d",
    "paths_2d",
    "quantized_matmul",
    "quantized_update",
    "rnn",
    "selective_scan",
    "selective_scan_2d",
    "ssd",
    "trapezoidal_ssd",
]
