"""Pure array functions, one folder per operation; Pallas lives here and nowhere else."""

from .explain import explain
from .linear_attention import linear_attention

__all__ = ["explain", "linear_attention"]
