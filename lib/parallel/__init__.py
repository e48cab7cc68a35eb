"""One model over many devices: the mesh, the places of arrays on it, and what needs more than a place."""

from .axes import logical_axes
from .mesh import AXES, BATCH_AXES, make_mesh
from .rules import RULES, shardings, state_shardings, table
from .sequence import causal_conv1d, linear_attention, linear_recurrence

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "causal_conv1d",
    "linear_attention",
    "linear_recurrence",
    "logical_axes",
    "make_mesh",
    "shardings",
    "state_shardings",
    "table",
]
