"""The product as the definition says it: each expert times all rows, of which its own are kept."""

import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator
from .decode import decoded, stored
from .inputs import Inputs, Spec, shape
from .rows import gathered, scattered


def forward(call: Inputs, spec: Spec) -> Array:
    """The call's result, in lhs's dtype."""
    dtype = accumulator(call.lhs.dtype)
    E, M, _, N = shape(call, spec)
    x, y = gathered(call, call.lhs).astype(dtype), jnp.zeros((M, N), dtype)
    ends = jnp.cumsum(call.group_sizes, dtype=jnp.int32)
    row = jnp.arange(M, dtype=jnp.int32)
    for e in range(E):
        if call.rhs is None:
            w = decoded({name: a[e] for name, a in stored(call).items()}, spec, dtype)
        else:
            w = call.rhs[e].astype(dtype)
        mine = ((row >= ends[e] - call.group_sizes[e]) & (row < ends[e]))[:, None]
        # A select, not a product with zero: what isn't finite stays with its own expert.
        product = jnp.matmul(jnp.where(mine, x, 0), w, precision="highest")
        y = jnp.where(mine, product, y)
    return scattered(call, spec, y).astype(call.lhs.dtype)
