"""Feature maps in the TPU kernels: q and k lie narrow in HBM, time along lanes, and become features in VMEM.

A Taylor feature is a product of two entries of z = [1, x]. Matrices of zeros and ones pick both factors for
all features at once, on the matrix unit, exactly: a chunk's features are two products and a multiplication.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from ..common.arguments import pad_to
from ..common.chips import LANES, SUBLANES
from ..common.tiling import round_up
from ..common.tpu import Launch, Layout, dot
from .features import factors

NARROW = ("q", "k")  # what a feature map widens
CONSTANTS = ("left", "right", "terms")


@dataclass(frozen=True)
class NarrowLayout(Layout):
    """The blocks of q or k, or of their gradient, as [B, heads, D', T']: a row of lanes for each channel."""

    @property
    def depth(self) -> int:
        return depth(self.shape[3], self.dtype)

    @property
    def time_major(self) -> bool:
        return False

    @property
    def arranged(self) -> tuple[int, ...]:
        return (self.shape[0], self.shape[2], self.depth, self.grid.padded)

    def arrange(self, x: Array) -> Array:
        return pad_to(jnp.transpose(x, (0, 2, 3, 1)), self.arranged)

    def restore(self, x: Array) -> Array:
        return jnp.transpose(x[:, :, : self.shape[3], : self.shape[1]], (0, 3, 1, 2))

    @property
    def spec(self) -> pl.BlockSpec:
        wide: Any = super().spec

        def index(b: Any, h: Any, t: Any) -> tuple[Any, ...]:
            b, h, t, _ = wide.index_map(b, h, t)
            return b, h, 0, t

        return pl.BlockSpec((*wide.block_shape[:2], self.depth, self.grid.block), index)

    # Inside a kernel:

    def load(self, ref, head: int, start, first) -> Array:
        """Tokens [D', chunk] of one head, from `start` in the block; `first` is not needed."""
        head = head // self.group if self.group <= self.per_step else 0
        return ref[0, head, :, pl.ds(start, self.chunk)]

    def store(self, ref, head: int, start, tokens: list[Array]) -> None:
        """Write float32 tokens [D', chunk] of consecutive heads, from `start` in the block."""
        for n, x in enumerate(tokens):
            ref[0, head + n, :, pl.ds(start, self.chunk)] = x.astype(self.dtype)


def depth(width: int, dtype: Any) -> int:
    """`width` channels as whole registers of sublanes."""
    return round_up(width, SUBLANES * 4 // jnp.dtype(dtype).itemsize)


def add_constants(launch: Launch, width: int, dtype: Any) -> None:
    """Give a kernel what picks the factors: left and right [D', F'], and terms [8, F'].

    Rows of `terms`: what is added to either factor (1 where it is the constant), and the features' weights,
    which are 0 past the last feature.
    """
    picked = factors(width)
    F = round_up(len(picked.weight), LANES)
    matrices = np.zeros((2, depth(width, dtype), F), np.float32)
    terms = np.zeros((SUBLANES, F), np.float32)
    for n, index in enumerate((picked.left, picked.right)):
        at = np.flatnonzero(index)
        matrices[n, index[at] - 1, at] = 1
        terms[n, np.flatnonzero(index == 0)] = 1
    terms[2, : len(picked.weight)] = picked.weight
    for name, x in zip(CONSTANTS, (*jnp.asarray(matrices, dtype), jnp.asarray(terms)), strict=True):
        launch.add(name, x, pl.BlockSpec(x.shape, lambda b, h, t: (0, 0)))


def expand(refs: dict, x: Array) -> Array:
    """The features [chunk, F'] of tokens [D', chunk], in their dtype."""
    left, right = _factors(refs, x)
    return (left * right * refs["terms"][2:3]).astype(x.dtype)


def contract(refs: dict, x: Array, d_features: Array) -> Array:
    """The gradient [D', chunk] of tokens, from that of their features [chunk, F']; float32."""
    left, right = _factors(refs, x)
    d_features = d_features * refs["terms"][2:3]
    of_left, of_right = ((d_features * other).astype(x.dtype) for other in (right, left))
    return dot(refs["left"][...], of_left, "nt") + dot(refs["right"][...], of_right, "nt")


def _factors(refs: dict, x: Array) -> list[Array]:
    """Both factors of each feature [chunk, F']."""
    return [dot(x, refs[side][...], "tn") + refs["terms"][n : n + 1] for n, side in enumerate(CONSTANTS[:2])]
