"""The causal convolution in Pallas (to come)."""

from jax import Array

from .inputs import Inputs


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    return "the kernel is not written yet"


def forward(call: Inputs, activation: str | None, *, interpret: bool) -> Array:
    raise NotImplementedError


def backward(call: Inputs, dy: Array, activation: str | None, *, interpret: bool) -> Inputs:
    raise NotImplementedError
