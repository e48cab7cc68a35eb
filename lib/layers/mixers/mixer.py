"""The base class of sequence mixers: dtypes, backend, and how they make their projections."""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ...kernels.common.operation import Backend
from ..modules.inputs import check_input
from ..modules.scaled_dense import scaled_dense


class Mixer(nn.Module):
    """A sequence mixer: `mixer(x, *, state=None, segment_ids=None) -> (y, state)` over x [B, T, D].

    Training passes no state; chunked prefill passes the one it got; decoding is the same call with T == 1.
    A state is a pytree of arrays whose first axis is the batch, and zeros mean "nothing read yet". It belongs
    to the document of the call's first token; documents after that one start afresh inside the call.

    Attributes:
      dtype: what the mixer computes and returns in; None means the input's.
      param_dtype: what its parameters are kept in.
      backend: handed to `frugax.kernels`; None picks by platform, "xla" has `jax.jvp` too.
      out_scale: multiplies the initial output projection; a decoder of depth L passes 1 / sqrt(2 L).

    Example:
        >>> import frugax, jax
        >>> class Mean(frugax.layers.Mixer):  # of the tokens so far: a mixer in five lines
        ...     def __call__(self, x, *, state=None, segment_ids=None):
        ...         total = jax.numpy.cumsum(self.prepare(x, segment_ids), axis=1)
        ...         return total / (1 + jax.numpy.arange(x.shape[1]))[:, None], total[:, -1]
        >>> y, state = Mean().apply({}, jax.numpy.ones((1, 3, 2)))
        >>> float(y[0, 2, 0]), float(state[0, 0])
        (1.0, 3.0)
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    backend: Backend | None = None
    out_scale: float = 1.0

    # A module (depth, width) -> {keyword: [depth, ...]}: what calls of this mixer take that differs by layer.
    over_depth: ClassVar[type[nn.Module] | None] = None

    def prepare(self, x: Array, segment_ids: Array | None) -> Array:
        """The input in the compute dtype; ValueError where it can't be right."""
        check_input(x, segment_ids)
        return x if self.dtype is None else x.astype(self.dtype)

    def dense(self, x: Array, features: int, name: str, *, use_bias: bool = False) -> Array:
        """x [..., D] -> [..., features] by a matrix of unit gain, in x's dtype."""
        layer = nn.Dense(features, use_bias=use_bias, dtype=x.dtype, param_dtype=self.param_dtype, name=name)
        return layer(x)

    def output(self, x: Array, features: int) -> Array:
        """The projection back to the residual stream, scaled for the depth at its birth."""
        return scaled_dense(features, self.out_scale, x.dtype, self.param_dtype, name="out")(x)
