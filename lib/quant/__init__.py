"""Quantization of trained weights: pure functions of weights and of statistics of their inputs."""

from . import training
from .awq import Awq, awq, awq_scale
from .calibrate import calibrate
from .clipping import clip_weights
from .files import load_params, save_params
from .gptq import gptq
from .params import PackedArray, PackedTable, quantize_params
from .qmoe import qmoe
from .rounding import bias_correction, learned_rounding
from .scaling import divide_outputs, equalization_scale, multiply_inputs, smoothquant_scale
from .sensitivity import activation_sensitivity, outlier_permutation, sensitive_layers
from .statistics import Statistics, output_error

__all__ = [
    "Awq",
    "PackedArray",
    "PackedTable",
    "Statistics",
    "activation_sensitivity",
    "awq",
    "awq_scale",
    "bias_correction",
    "calibrate",
    "clip_weights",
    "divide_outputs",
    "equalization_scale",
    "gptq",
    "learned_rounding",
    "load_params",
    "multiply_inputs",
    "outlier_permutation",
    "output_error",
    "qmoe",
    "quantize_params",
    "save_params",
    "sensitive_layers",
    "smoothquant_scale",
    "training",
]
