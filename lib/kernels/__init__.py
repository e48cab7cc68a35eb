"""Pure array functions, one folder per operation; Pallas lives here and nowhere else."""

from .causal_conv1d import causal_conv1d
from .explain import explain
from .linear_attention import linear_attention
from .linear_recurrence import linear_recurrence

__all__ = ["causal_conv1d", "explain", "linear_attention", "linear_recurrence"]
