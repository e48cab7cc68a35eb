"""One model over many devices: what needs more than a sharding annotation."""

from .sequence import causal_conv1d, linear_attention, linear_recurrence

__all__ = ["causal_conv1d", "linear_attention", "linear_recurrence"]
