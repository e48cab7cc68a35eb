"""A classifier of images whose stages are blocks of selective scans or convolutions."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ..layers.modules.dense import Dense
from ..layers.modules.stacked import STACKED
from ..layers.vision.blocks import EVSS, VSS, InvertedResidual, dtypes_of
from ..layers.vision.selective_scan_2d import check_image

BLOCKS = ("EVSS", "VSS", "InvertedResidual")


class VisionMamba(nn.Module):
    """A classifier, images [B, H, W, C] -> logits [B, classes]: patches, stages of blocks, mean, linear head.

    A patch, and between stages each 2 x 2 pixels, become one pixel by a linear map and a norm. Images can
    have any size: right and bottom are padded with zeros to whole patches.

    Attributes:
      classes: number of classes.
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
    large, and inverted residuals later. VMamba (2401.10166) is VSS in all stages. Both drop whole blocks at
    random in training, and this doesn't.

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
        dtypes = dtypes_of(self, x)
        of_scans = {"scan_args": self.scan_args, "mlp_expand": self.mlp_expand}
        kinds: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
            "EVSS": (EVSS, of_scans),
            "VSS": (VSS, of_scans),
            "InvertedResidual": (InvertedResidual, {}),
        }
        for i, (width, depth, name) in enumerate(zip(self.widths, self.depths, self.blocks, strict=True)):
            x = merge_patches(x, 2 if i else self.patch)
            x = Dense(width, use_bias=False, **dtypes, name=f"merge_{i}")(x)
            x = nn.LayerNorm(**dtypes, name=f"merge_norm_{i}")(x)
            block, args = kinds[name]
            stage = nn.scan(
                _Step,
                **STACKED,
                length=depth,
                check_constancy_invariants=False,  # as in the decoder
            )
            x, _ = stage(block, tuple((args | dtypes).items()), name=f"stage_{i}")(x, None)
        x = jnp.mean(nn.LayerNorm(**dtypes, name="norm")(x), axis=(1, 2))
        return Dense(self.classes, **dtypes, name="head")(x)

    def _check(self) -> None:
        for name in ("classes", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected a number >= 1")
        sizes = {name: getattr(self, name) for name in ("widths", "depths", "blocks")}
        if len({len(x) for x in sizes.values()}) > 1 or not self.widths:
            got = ", ".join(f"{name} {tuple(x)}" for name, x in sizes.items())
            raise ValueError(f"widths, depths, blocks: got {got}; expected one of each for every stage")
        for name in ("widths", "depths"):
            if min(sizes[name]) < 1:
                raise ValueError(f"{name}: got {tuple(sizes[name])}; expected numbers >= 1")
        for name in self.blocks:
            if name not in BLOCKS:
                raise ValueError(f"blocks: got {name!r}; expected one of {', '.join(BLOCKS)}")


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
