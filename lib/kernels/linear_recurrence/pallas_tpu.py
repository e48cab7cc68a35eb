"""Mosaic TPU kernels."""

from .inputs import Inputs


def unsupported_reason(inputs: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can."""
    return "not written yet"
