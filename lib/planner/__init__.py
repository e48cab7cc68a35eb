"""Plans of training over many devices, made without them: memory, time and the best mesh."""

from .analytic import Layer, TrainingBytes, convolution, dense, training_bytes, transformer_block
from .liveness import Liveness, liveness

__all__ = [
    "Layer",
    "Liveness",
    "TrainingBytes",
    "convolution",
    "dense",
    "liveness",
    "training_bytes",
    "transformer_block",
]
