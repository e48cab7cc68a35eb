"""The product as the definition says it: dequantize W, multiply.

Of rounded activations the products within a group of W's rows, or a block of channels, are summed first: in
int32 where both formats hold whole numbers. The sum is scaled then.
"""

import itertools

import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import accumulator
from .activations import quantize_activations
from .decode import Groups, groups, values
from .inputs import Inputs, Spec, largest_whole, weights


def forward(call: Inputs, spec: Spec) -> Array:
    """x W + b [M, N] in x's dtype."""
    dtype = accumulator(call.x.dtype)
    codes, stored = weights(call, spec).unpacked().T, groups(call, spec)

    def rows(start: int, end: int) -> tuple[Array, Array]:
        """Unscaled values [rows, N] of a group of W, or of a part of one, and their scale [1, N]."""
        own = Groups(*(a if a is None else a[start // spec.group_size][None] for a in stored))
        value, scale = values(codes[None, start:end], own, spec.format)
        return value[0], scale.astype(dtype)

    edges = [*range(0, spec.K, spec.group_size), spec.K]
    w = [value.astype(dtype) * scale for value, scale in itertools.starmap(rows, itertools.pairwise(edges))]
    y = jnp.matmul(call.x.astype(dtype), jnp.concatenate(w), precision="highest")
    if spec.activations is not None:
        x = quantize_activations(call.x, spec)
        assert x.scales is not None
        operand = jnp.int32 if x.whole and largest_whole(spec.format) is not None else dtype
        edges = sorted({*edges, *range(0, spec.K, x.block)})
        rounded = jnp.zeros_like(y)
        for start, end in itertools.pairwise(edges):
            value, scale = rows(start, end)
            parts = x.values[:, start:end].astype(operand), value.astype(operand)
            sums = jnp.matmul(*parts, precision="highest").astype(dtype)
            rounded += sums * x.scales[:, start // x.block, None] * scale
        y = lax.stop_gradient(rounded) + (y - lax.stop_gradient(y))  # its gradient is that of x W
    if call.bias is not None:
        y += call.bias.astype(dtype)[None]
    return y.astype(call.x.dtype)
