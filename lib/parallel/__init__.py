"""One model over many devices: the mesh, the places of arrays on it, and what needs more than a place."""

from .axes import logical_axes
from .experts import ExpertLoad, expert_parallel, expert_parallel_bytes, experts_over_mesh
from .mesh import AXES, BATCH_AXES, make_mesh
from .rules import RULES, shardings, state_shardings, table
from .sequence import causal_conv1d, linear_attention, linear_recurrence

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "ExpertLoad",
    "causal_conv1d",
    "expert_parallel",
    "expert_parallel_bytes",
    "experts_over_mesh",
    "linear_attention",
    "linear_recurrence",
    "logical_axes",
    "make_mesh",
    "shardings",
    "state_shardings",
    "table",
]
