"""The product as the definition says it: dequantize W, multiply."""

from jax import Array

from ..common.arguments import accumulator
from .inputs import Inputs, Spec, weights


def forward(call: Inputs, spec: Spec) -> Array:
    """x W + b [M, N] in x's dtype."""
    dtype = accumulator(call.x.dtype)
    y = call.x.astype(dtype) @ weights(call, spec).dequantize(dtype)
    if call.bias is not None:
        y += call.bias.astype(dtype)
    return y.astype(call.x.dtype)
