"""The product on Hopper (Mosaic GPU): weights of 2 to 8 bits by tokens in 16 or in 8."""

import jax.numpy as jnp
from jax import Array

from ....formats.codebook import Codebook
from ....formats.integer import Bipolar, Integer
from ....formats.minifloat import Minifloat
from ...common import compat
from ..inputs import Inputs, Spec
from . import narrow
from .kernel import product
from .tiling import tiling
from .transposed import gradient


def unsupported_reason(call: Inputs, spec: Spec) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    element = spec.format.element
    if call.x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the GPU kernel multiplies bfloat16 and float16, not {call.x.dtype}"
    if spec.method != "dot":
        return f"the GPU kernel sums products of values, not {spec.method!r}"
    if call.choices is not None:
        return "the GPU kernel has one codebook for all groups"
    if not isinstance(element, Integer | Bipolar | Minifloat | Codebook):
        return f"the GPU kernel has no decoder of {element.name}"
    if isinstance(element, Codebook) and len(element.values) > 16:
        return f"the GPU kernel takes codebooks of up to 16 values, not {len(element.values)}"
    if element.bits < 2:
        return "the GPU kernel takes 2 to 8 bits, not 1"
    if (reason := narrow.unsupported_reason(call, spec)) is not None:
        return reason
    return tiling(call, spec)[1] or tiling(call, spec, backward=True)[1] or compat.local_gpu_lacks_mosaic()


def forward(call: Inputs, spec: Spec, *, interpret: bool) -> Array:
    """x W + b [M, N] in x's dtype."""
    sizes, _ = tiling(call, spec)
    assert sizes is not None  # unsupported_reason
    return product(call, spec, sizes, interpret=interpret)


def backward(call: Inputs, cotangent: Array, spec: Spec, *, interpret: bool) -> Inputs:
    """The gradients of x and bias: no more of W is ever decoded than registers hold."""
    sizes, _ = tiling(call, spec, backward=True)
    assert sizes is not None  # unsupported_reason
    dx = gradient(call, cotangent, spec, sizes, interpret=interpret)
    dbias = None if call.bias is None else cotangent.astype(jnp.float32).sum(0).astype(call.bias.dtype)
    constant = (jnp.zeros_like(x) if _is_float(x) else None for x in call)
    return Inputs(*constant)._replace(x=dx, bias=dbias)


def _is_float(x: Array | None) -> bool:
    return x is not None and jnp.issubdtype(x.dtype, jnp.floating)
