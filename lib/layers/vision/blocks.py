"""Blocks of image models: VMamba's, EfficientVMamba's, inverted residuals, squeeze and excite."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ..channel.mlp import MLP, activation_fn
from ..modules.dense import Dense
from ..modules.depthwise_conv import DepthwiseConv
from .selective_scan_2d import SelectiveScan2D


class VSS(nn.Module):
    """VMamba's block over x [B, H, W, C]: x + scan(norm(x)), then x + mlp(norm(x)). The scan is "cross".

    Attributes:
      scan_args: attributes of `SelectiveScan2D` that differ from its defaults.
      mlp_expand: hidden width of the MLP over the width; 0 leaves it out.
      dtype, param_dtype: as in `Mixer`.

    Source: Liu et al. 2024 (VMamba, arXiv 2401.10166).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> block = frugax.layers.VSS({"state_size": 4})
        >>> y, params = block.init_with_output(jax.random.key(0), jnp.ones((1, 7, 5, 16)))
        >>> y.shape
        (1, 7, 5, 16)
    """

    scan_args: Mapping[str, Any] | None = None
    mlp_expand: int | float = 4
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtypes = dtypes_of(self, x)
        y = nn.LayerNorm(**dtypes, name="norm")(x)
        args = {"scan": "cross"} | dict(self.scan_args or {})
        x = x + SelectiveScan2D(**args, **dtypes, name="scan")(y)
        return _with_mlp(x, self.mlp_expand, dtypes)


class EVSS(nn.Module):
    """EfficientVMamba's block over x [B, H, W, C]: x + se(scan(norm(x))) + se(conv(norm(x))), then an MLP.

    The scan is "atrous". The branch of convolutions is depthwise 3 x 3, norm, gelu and 1 x 1; `se`, shared by
    both branches, weighs channels by what the whole image holds (`SqueezeExcite` with its norm).

    Attributes: those of `VSS`.

    Source: Pei et al. 2024 (EfficientVMamba, arXiv 2403.09977), as its code has it. There batch norm stands
    among the convolutions, where here is a norm over each pixel's channels.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> block = frugax.layers.EVSS({"state_size": 4, "stride": 2})
        >>> y, params = block.init_with_output(jax.random.key(0), jnp.ones((1, 7, 5, 16)))
        >>> y.shape
        (1, 7, 5, 16)
    """

    scan_args: Mapping[str, Any] | None = None
    mlp_expand: int | float = 4
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtypes = dtypes_of(self, x)
        width = x.shape[-1]
        y = nn.LayerNorm(**dtypes, name="norm")(x)
        args = {"scan": "atrous"} | dict(self.scan_args or {})
        scanned = SelectiveScan2D(**args, **dtypes, name="scan")(y)
        local = DepthwiseConv(**dtypes, name="conv")(y)
        local = jax.nn.gelu(nn.LayerNorm(**dtypes, name="conv_norm")(local))
        local = Dense(width, **dtypes, name="conv_out")(local)
        weigh = SqueezeExcite(normalize=True, **dtypes, name="weigh")
        x = x + weigh(scanned) + weigh(local)
        return _with_mlp(x, self.mlp_expand, dtypes)


class InvertedResidual(nn.Module):
    """x + norm(W_2 se(relu(norm(conv(relu(norm(W_1 x))))))) over x [B, H, W, C].

    The 3 x 3 convolution is depthwise; `se` weighs its channels (`SqueezeExcite`).

    Attributes:
      expand: channels of the convolution over the width.
      dtype, param_dtype: as in `Mixer`.

    Source: MobileNetV2, Sandler et al. 2018 (arXiv 1801.04381), with the `se` of EfficientVMamba
    (2403.09977), which has these blocks in its later stages. Their norms are batch norms.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> block = frugax.layers.InvertedResidual()
        >>> y, params = block.init_with_output(jax.random.key(0), jnp.ones((1, 7, 5, 16)))
        >>> y.shape
        (1, 7, 5, 16)
    """

    expand: int | float = 4
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtypes = dtypes_of(self, x)
        width, hidden = x.shape[-1], round(self.expand * x.shape[-1])
        y = Dense(hidden, use_bias=False, **dtypes, name="in")(x)
        y = jax.nn.relu(nn.LayerNorm(**dtypes, name="in_norm")(y))
        y = DepthwiseConv(use_bias=False, **dtypes, name="conv")(y)
        y = jax.nn.relu(nn.LayerNorm(**dtypes, name="conv_norm")(y))
        y = SqueezeExcite(activation="relu", **dtypes, name="weigh")(y)
        y = Dense(width, use_bias=False, **dtypes, name="out")(y)
        return x + nn.LayerNorm(**dtypes, name="out_norm")(y)


class SqueezeExcite(nn.Module):
    """x * sigmoid(W_2 gelu(W_1 mean of x over the image)): weighs channels, x [B, H, W, C].

    Attributes:
      ratio: hidden width over the width, rounded down; at least one channel.
      normalize: take the mean of LayerNorm(x) instead of x.
      activation: as in `GLU`.
      dtype, param_dtype: as in `Mixer`.

    Source: Hu et al. 2017 (arXiv 1709.01507); ratio, gelu and norm from EfficientVMamba (2403.09977).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jnp.ones((1, 7, 5, 16))
        >>> y, params = frugax.layers.SqueezeExcite().init_with_output(jax.random.key(0), x)
        >>> y.shape
        (1, 7, 5, 16)
    """

    ratio: float = 0.125
    normalize: bool = False
    activation: str | None = "gelu"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtypes = dtypes_of(self, x)
        y = nn.LayerNorm(**dtypes, name="norm")(x) if self.normalize else x
        y = jnp.mean(y, axis=(1, 2), keepdims=True)
        y = Dense(max(1, int(self.ratio * x.shape[-1])), **dtypes, name="squeeze")(y)
        y = activation_fn(self.activation)(y)
        return x * jax.nn.sigmoid(Dense(x.shape[-1], **dtypes, name="excite")(y))


def dtypes_of(module: Any, x: Array) -> dict[str, DTypeLike]:
    """Keyword arguments for what is inside `module`: its dtypes, where it has none the input's."""
    return {"dtype": module.dtype or x.dtype, "param_dtype": module.param_dtype}


def _with_mlp(x: Array, expand: int | float, dtypes: dict[str, DTypeLike]) -> Array:
    if not expand:
        return x
    mlp = MLP(expand=expand, activation="gelu", **dtypes, name="mlp")
    y = nn.LayerNorm(**dtypes, name="mlp_norm")(x)
    # A channel mixer reads [batch, time, width]: an image is H W tokens.
    return x + mlp(y.reshape(y.shape[0], -1, y.shape[-1])).reshape(y.shape)
