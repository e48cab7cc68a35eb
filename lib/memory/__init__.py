"""Fewer activations on the device: recompute them, keep them on the host, or compute in tiles of time."""

from .policies import LAYER_INPUT, POLICIES, Policy, remat_policy
from .tiles import tiled, tiled_module
from .tiles_over_mesh import tiled_over_mesh

__all__ = ["LAYER_INPUT", "POLICIES", "Policy", "remat_policy", "tiled", "tiled_module", "tiled_over_mesh"]
