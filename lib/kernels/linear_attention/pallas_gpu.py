"""Linear attention in Pallas (to come)."""

from jax import Array

from .inputs import Inputs


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    return "the kernel is not written yet"


def forward(call: Inputs, scale: float, *, interpret: bool) -> tuple[Array, Array]:
    raise NotImplementedError


def backward(call: Inputs, cotangents: tuple[Array, Array], scale: float, *, interpret: bool) -> Inputs:
    raise NotImplementedError
