"""Plans of training over many devices, made without them: memory, time and the best mesh."""

from .analytic import Layer, TrainingBytes, convolution, dense, training_bytes, transformer_block
from .liveness import Liveness, liveness
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

__all__ = [
    "Cluster",
    "Configuration",
    "Found",
    "Latency",
    "Layer",
    "Liveness",
    "TrainingBytes",
    "Workload",
    "configurations",
    "convolution",
    "dense",
    "device_bytes",
    "latency",
    "liveness",
    "place",
    "search",
    "training_bytes",
    "transformer_block",
    "transformer_workload",
]
