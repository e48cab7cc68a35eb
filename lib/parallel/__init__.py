"""One model over many devices: the mesh, the places of arrays on it, and what needs more than a place."""

from .activations import place_activations, tensor_messages
from .attention import ring_attention, ring_self_attention, ulysses_attention
from .axes import logical_axes
from .collective_matmul import all_gather_matmul, matmul_reduce_scatter, overlapped_seconds
from .experts import ExpertLoad, expert_parallel, expert_parallel_bytes, experts_over_mesh
from .mesh import AXES, BATCH_AXES, make_mesh
from .mesh_matmul import MeshCost, folded_ring, mesh_cost, mesh_gemm, mesh_gemv
from .pipeline import Pipelined, pipeline_gradients
from .placement import expert_parallel_with_copies, plan_placement, route_to_copies
from .rules import RULES, shardings, state_shardings, table
from .schedules import Timeline, pipeline_schedule, pipeline_timeline
from .sequence import causal_conv1d, linear_attention, linear_recurrence
from .slots import Slots, pipeline_slots
from .state_spaces import lmu, selective_scan, ssd, trapezoidal_ssd

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "ExpertLoad",
    "MeshCost",
    "Pipelined",
    "Slots",
    "Timeline",
    "all_gather_matmul",
    "causal_conv1d",
    "expert_parallel",
    "expert_parallel_bytes",
    "expert_parallel_with_copies",
    "experts_over_mesh",
    "folded_ring",
    "linear_attention",
    "linear_recurrence",
    "lmu",
    "logical_axes",
    "make_mesh",
    "matmul_reduce_scatter",
    "mesh_cost",
    "mesh_gemm",
    "mesh_gemv",
    "overlapped_seconds",
    "pipeline_gradients",
    "pipeline_schedule",
    "pipeline_slots",
    "pipeline_timeline",
    "place_activations",
    "plan_placement",
    "ring_attention",
    "ring_self_attention",
    "route_to_copies",
    "selective_scan",
    "shardings",
    "ssd",
    "state_shardings",
    "table",
    "tensor_messages",
    "trapezoidal_ssd",
    "ulysses_attention",
]
