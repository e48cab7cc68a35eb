"""Quantization of trained weights: pure functions of weights and of statistics of their inputs."""

from .files import load_params, save_params
from .params import PackedArray, PackedTable, quantize_params

__all__ = ["PackedArray", "PackedTable", "load_params", "quantize_params", "save_params"]
