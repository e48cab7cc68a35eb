"""The product on TPU: not written yet."""

from .inputs import Inputs, Spec


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why this kernel can't serve the call."""
    return "the TPU kernel is not written yet"
