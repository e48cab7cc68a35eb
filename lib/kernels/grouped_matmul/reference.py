"""The product as the definition says it: each expert times all rows, of which its own are kept."""

import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator
from ..quantized_matmul.inputs import weights
from .inputs import Inputs, Spec, expert, shape
from .rows import gathered, scattered


def forward(call: Inputs, spec: Spec) -> Array:
    """The call's result, in lhs's dtype."""
    dtype = accumulator(call.lhs.dtype)
    E, M, _, N = shape(call, spec)
    x, y = gathered(call, call.lhs).astype(dtype), jnp.zeros((M, N), dtype)
    ends = jnp.cumsum(call.group_sizes, dtype=jnp.int32)
    row = jnp.arange(M, dtype=jnp.int32)
    for e in range(E):
        w = weights(*expert(call, spec, e)).dequantize(dtype) if call.rhs is None else call.rhs[e]
        mine = ((row >= ends[e] - call.group_sizes[e]) & (row < ends[e]))[:, None]
        # A select, not a product with zero: what isn't finite stays with its own expert.
        product = jnp.matmul(jnp.where(mine, x, 0), w.astype(dtype), precision="highest")
        y = jnp.where(mine, product, y)
    return scattered(call, spec, y).astype(call.lhs.dtype)
