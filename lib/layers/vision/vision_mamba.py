"""Image models of selective scans: VMamba's block, EfficientVMamba's, and a classifier of such stages."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ..channel.mlp import MLP
from ..modules.depthwise_conv import DepthwiseConv
from .selective_scan_2d import SelectiveScan2D, check_image

BLOCKS = ("EVSS", "VSS", "InvertedResidual")


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
        numbers = _numbers(self, x)
        y = nn.LayerNorm(**numbers, name="norm")(x)
        args = {"scan": "cross"} | dict(self.scan_args or {})
        x = x + SelectiveScan2D(**args, **numbers, name="scan")(y)
        return _with_mlp(x, self.mlp_expand, numbers)


class EVSS(nn.Module):
    """EfficientVMamba's block over x [B, H, W, C]: x + se(scan(norm(x))) + se(conv(norm(x))), then an MLP.

    The scan is "atrous". The branch of convolutions is depthwise 3 x 3, norm, gelu and 1 x 1; each `se`
    weighs its branch's channels by what the whole image holds (`SqueezeExcite`).

    Attributes: those of `VSS`.

    Source: Pei et al. 2024 (EfficientVMamba, arXiv 2403.09977). Its code shares one `se` between the
    branches and has batch norm among the convolutions, where here is a norm over each pixel's channels.

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
        numbers = _numbers(self, x)
        width = x.shape[-1]
        y = nn.LayerNorm(**numbers, name="norm")(x)
        args = {"scan": "atrous"} | dict(self.scan_args or {})
        scanned = SelectiveScan2D(**args, **numbers, name="scan")(y)
        local = DepthwiseConv(**numbers, name="conv")(y)
        local = jax.nn.gelu(nn.LayerNorm(**numbers, name="conv_norm")(local))
        local = nn.Dense(width, **numbers, name="conv_out")(local)
        x = x + SqueezeExcite(**numbers, name="weigh_scan")(scanned)
        x = x + SqueezeExcite(**numbers, name="weigh_conv")(local)
        return _with_mlp(x, self.mlp_expand, numbers)


class InvertedResidual(nn.Module):
    """x + W_2 gelu(norm(conv(gelu(norm(W_1 x))))) over x [B, H, W, C], the 3 x 3 convolution depthwise.

    Attributes:
      expand: channels of the convolution over the width.
      dtype, param_dtype: as in `Mixer`.

    Source: MobileNetV2, Sandler et al. 2018 (arXiv 1801.04381), whose norm is batch norm; EfficientVMamba
    (2403.09977) has these blocks in its later stages.

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
        numbers = _numbers(self, x)
        width, hidden = x.shape[-1], round(self.expand * x.shape[-1])
        y = nn.Dense(hidden, use_bias=False, **numbers, name="in")(x)
        y = jax.nn.gelu(nn.LayerNorm(**numbers, name="in_norm")(y))
        y = DepthwiseConv(use_bias=False, **numbers, name="conv")(y)
        y = jax.nn.gelu(nn.LayerNorm(**numbers, name="conv_norm")(y))
        return x + nn.Dense(width, **numbers, name="out")(y)


class SqueezeExcite(nn.Module):
    """x * sigmoid(W_2 gelu(W_1 mean of x over the image)): weighs channels, x [B, H, W, C].

    Attributes:
      ratio: hidden width over the width; at least one channel.
      dtype, param_dtype: as in `Mixer`.

    Source: Hu et al. 2017 (arXiv 1709.01507); ratio and gelu from EfficientVMamba (2403.09977).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jnp.ones((1, 7, 5, 16))
        >>> y, params = frugax.layers.SqueezeExcite().init_with_output(jax.random.key(0), x)
        >>> y.shape
        (1, 7, 5, 16)
    """

    ratio: float = 0.125
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        numbers = _numbers(self, x)
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = jax.nn.gelu(nn.Dense(max(1, round(self.ratio * x.shape[-1])), **numbers, name="squeeze")(y))
        return x * jax.nn.sigmoid(nn.Dense(x.shape[-1], **numbers, name="excite")(y))


class VisionMamba(nn.Module):
    """Classifies images [B, H, W, C] -> logits [B, classes]: patches, stages of blocks, mean, linear head.

    A patch, and between stages each 2 x 2 pixels, become one pixel by a linear map and a norm. Images of any
    size fit: right and bottom are padded with zeros to whole patches.

    Attributes:
      classes: how many.
      widths: channels of each stage.
      depths: blocks of each stage.
      blocks: of each stage "EVSS", "VSS" or "InvertedResidual".
      patch: pixels along a patch.
      scan_args: attributes of `SelectiveScan2D` that differ from its defaults.
      mlp_expand: of EVSS and VSS.
      dtype, param_dtype: as in `Mixer`.

    Raises:
      ValueError: naming the argument that can't be right.

    Source: Pei et al. 2024 (EfficientVMamba, arXiv 2403.09977): scans in the early stages, where the map is
    large, and inverted residuals later. VMamba (2401.10166) is VSS in all stages.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> model = frugax.layers.VisionMamba(10, (16, 24), (1, 1), ("EVSS", "InvertedResidual"), patch=2)
        >>> logits, params = model.init_with_output(jax.random.key(0), jnp.ones((2, 9, 7, 1)))
        >>> logits.shape
        (2, 10)
    """

    classes: int
    widths: tuple[int, ...] = (48, 96, 192, 384)
    depths: tuple[int, ...] = (2, 2, 4, 2)
    blocks: tuple[str, ...] = ("EVSS", "EVSS", "InvertedResidual", "InvertedResidual")
    patch: int = 4
    scan_args: Mapping[str, Any] | None = None
    mlp_expand: int | float = 4
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        check_image(x)
        self._check()
        numbers = _numbers(self, x)
        of_scans = {"scan_args": self.scan_args, "mlp_expand": self.mlp_expand}
        kinds: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
            "EVSS": (EVSS, of_scans),
            "VSS": (VSS, of_scans),
            "InvertedResidual": (InvertedResidual, {}),
        }
        for i, (width, depth, name) in enumerate(zip(self.widths, self.depths, self.blocks, strict=True)):
            x = merge_patches(x, 2 if i else self.patch)
            x = nn.Dense(width, use_bias=False, **numbers, name=f"merge_{i}")(x)
            x = nn.LayerNorm(**numbers, name=f"merge_norm_{i}")(x)
            block, args = kinds[name]
            stage = nn.scan(
                _Step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=depth,
                check_constancy_invariants=False,  # as in the decoder
            )
            x, _ = stage(block, tuple((args | numbers).items()), name=f"stage_{i}")(x, None)
        x = jnp.mean(nn.LayerNorm(**numbers, name="norm")(x), axis=(1, 2))
        return nn.Dense(self.classes, **numbers, name="head")(x)

    def _check(self) -> None:
        for name in ("classes", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; a number >= 1 fits")
        sizes = {name: getattr(self, name) for name in ("widths", "depths", "blocks")}
        if len({len(x) for x in sizes.values()}) > 1 or not self.widths:
            got = ", ".join(f"{name} {tuple(x)}" for name, x in sizes.items())
            raise ValueError(f"widths, depths, blocks: got {got}; one of each for every stage fits")
        for name in ("widths", "depths"):
            if min(sizes[name]) < 1:
                raise ValueError(f"{name}: got {tuple(sizes[name])}; numbers >= 1 fit")
        for name in self.blocks:
            if name not in BLOCKS:
                raise ValueError(f"blocks: got {name!r}; {', '.join(BLOCKS)} fit")


class _Step(nn.Module):
    """One block, as a scan over depth calls it."""

    block: type[nn.Module]
    args: tuple[tuple[str, Any], ...]

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        return self.block(**dict(self.args), name="block")(x), None


def merge_patches(x_BHWC: Array, size: int) -> Array:
    """Each size x size pixels as one [B, ceil(H / size), ceil(W / size), size^2 C]; zeros pad the image."""
    B, H, W, C = x_BHWC.shape
    x = jnp.pad(x_BHWC, ((0, 0), (0, -H % size), (0, -W % size), (0, 0)))
    h, w = x.shape[1] // size, x.shape[2] // size
    return x.reshape(B, h, size, w, size, C).swapaxes(2, 3).reshape(B, h, w, size * size * C)


def _numbers(module: Any, x: Array) -> dict[str, DTypeLike]:
    return {"dtype": module.dtype or x.dtype, "param_dtype": module.param_dtype}


def _with_mlp(x: Array, expand: int | float, numbers: dict[str, DTypeLike]) -> Array:
    if not expand:
        return x
    mlp = MLP(expand=expand, activation="gelu", **numbers, name="mlp")
    y = nn.LayerNorm(**numbers, name="mlp_norm")(x)
    # A channel mixer reads [batch, time, width]: an image is H W tokens.
    return x + mlp(y.reshape(y.shape[0], -1, y.shape[-1])).reshape(y.shape)
