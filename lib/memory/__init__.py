"""Fewer activations on the device: recompute them, keep them on the host, or compute in tiles of time."""

from .host_state import state_on_host
from .policies import LAYER_INPUT, POLICIES, Policy, remat_policy
from .tiles import tiled, tiled_module
from .tiles_over_mesh import tiled_over_mesh

__all__ = [
    "LAYER_INPUT",
    "POLICIES",
    "Policy",
    "remat_policy",
    "state_on_host",
    "tiled",
    "tiled_module",
    "tiled_over_mesh",
]
