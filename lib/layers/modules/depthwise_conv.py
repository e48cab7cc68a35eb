"""A 2-D convolution of each channel by itself, written as shifted products."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ...kernels.common.arguments import accumulator


class DepthwiseConv(nn.Module):
    """y[i, j] = sum_ab kernel[a, b] * x[i + a - 1, j + b - 1] + bias over x [B, H, W, C], padded with zeros.

    Params are those of `nn.Conv(C, (3, 3), feature_group_count=C)`. Nine products that fuse into one
    pass take the convolution's place: XLA computes its kernel's gradient on CPU for every pair of channels.

    Attributes:
      use_bias: add one.
      dtype, param_dtype: as in `Mixer`.

    Source: Howard et al. 2017, MobileNets (arXiv 1704.04861).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> conv = frugax.layers.DepthwiseConv()
        >>> y, params = conv.init_with_output(jax.random.key(0), jnp.ones((1, 7, 5, 16)))
        >>> y.shape, params["params"]["kernel"].shape
        ((1, 7, 5, 16), (3, 3, 1, 16))
    """

    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        H, W, C = x.shape[1:]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 1, C), self.param_dtype)
        dtype = self.dtype or x.dtype
        padded = jnp.pad(x.astype(dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        # Summed in float32, as a convolution does.
        wide = accumulator(jnp.dtype(dtype))
        y = jnp.zeros((), wide)
        for a in range(3):
            for b in range(3):
                y = y + padded[:, a : a + H, b : b + W].astype(wide) * kernel[a, b].astype(wide)[None, None]
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (C,), self.param_dtype)
            y = y + bias.astype(wide)[None, None, None]
        return y.astype(dtype)
