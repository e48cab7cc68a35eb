"""Plans of training over many devices, made without them: memory, time and the best mesh."""

from .analytic import Layer, TrainingBytes, convolution, dense, training_bytes, transformer_block
from .flops import Flops, flops
from .hlo import Collective, collectives
from .liveness import Liveness, liveness
from .plan import Plan, mfu, plan
from .search import (
    Cluster,
    Configuration,
    Found,
    Latency,
    Workload,
    configurations,
    device_bytes,
    latency,
    place,
    search,
    transformer_workload,
)
from .topology import Topology, topology

__all__ = [
    "Cluster",
    "Collective",
    "Configuration",
    "Flops",
    "Found",
    "Latency",
    "Layer",
    "Liveness",
    "Plan",
    "Topology",
    "TrainingBytes",
    "Workload",
    "collectives",
    "configurations",
    "convolution",
    "dense",
    "device_bytes",
    "flops",
    "latency",
    "liveness",
    "mfu",
    "place",
    "plan",
    "search",
    "topology",
    "training_bytes",
    "transformer_block",
    "transformer_workload",
]
