"""Mamba's selective scan over images: VMamba's four ways across, or EfficientVMamba's interleaved grids."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ...kernels import paths_2d, selective_scan_2d
from ...kernels.common.arguments import accumulator
from ...kernels.common.operation import Backend
from ...kernels.selective_scan_2d import Scan
from ..mixers.mamba import init_dt_bias, init_rates, inner_width
from ..modules.dense import projection
from ..modules.depthwise_conv import DepthwiseConv
from ..modules.packed import as_array, matrix_param

_STAND_STILL = -1e4  # added to dt before its softplus: a step of exactly 0


class SelectiveScan2D(nn.Module):
    """x [B, H, W, C] -> [B, H, W, C]: out(norm(scans of silu(conv(W_1 x))) * silu(W_2 x)).

    Each of the K scans has a Mamba recurrence of its own: dt, B and C by its own projections, A and D.
    "cross" scans all H W pixels four times, by rows, by columns, and both backwards, and adds the results.
    "atrous" deals the pixels to stride^2 interleaved grids and scans each once, by rows or columns in turn:
    H W pixels in all, whatever the stride. Where the stride doesn't divide H or W, some grids are smaller.

    Attributes:
      scan: "atrous" or "cross".
      stride: between the pixels of a grid, of "atrous" alone.
      expand: channels of the recurrence over the width.
      state_size: states of each channel, N.
      dt_rank: columns of dt's first matrix; None means a sixteenth of the width, rounded up.
      out_scale, dtype, param_dtype, backend: as in `Mixer`.

    Raises:
      ValueError: naming the argument that can't be right.

    Source: SS2D of VMamba, Liu et al. 2024 (arXiv 2401.10166); ES2D of EfficientVMamba, Pei et al. 2024
    (2403.09977). There the pixels that pad an image to a multiple of the stride are scanned too.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> scan = frugax.layers.SelectiveScan2D("atrous", state_size=4)
        >>> y, params = scan.init_with_output(jax.random.key(0), jnp.ones((1, 7, 5, 16)))
        >>> y.shape
        (1, 7, 5, 16)
    """

    scan: Scan = "atrous"
    stride: int = 2
    expand: int | float = 2
    state_size: int = 16
    dt_rank: int | None = None
    out_scale: float = 1.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    backend: Backend | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        check_image(x)
        width, N = x.shape[-1], self.state_size
        E = inner_width(width, self.expand)
        R = math.ceil(width / 16) if self.dt_rank is None else self.dt_rank
        for name, size in (("stride", self.stride), ("state_size", N), ("dt_rank", R)):
            if size < 1:
                raise ValueError(f"{name}: got {size}; expected a number >= 1")
        x = x if self.dtype is None else x.astype(self.dtype)
        dtypes = {"dtype": x.dtype, "param_dtype": self.param_dtype}
        how: dict[str, Any] = {"dtype": x.dtype, "param_dtype": self.param_dtype, "backend": self.backend}

        u, z = jnp.split(projection(2 * E, **how, name="in_gate")(x), 2, axis=-1)
        u = jax.nn.silu(DepthwiseConv(**dtypes, name="conv")(u))
        which = {"scan": self.scan, "step": self.stride}
        u_KBLE = paths_2d(u, **which)
        K = u_KBLE.shape[0]

        unit = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        third = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))  # +- R^-0.5
        low_B_C = matrix_param(self, "dt_B_C", unit, (K, E, R + 2 * N), self.param_dtype)
        of_low = matrix_param(self, "dt", third, (K, R, E), self.param_dtype)
        mixed = jnp.einsum("kble,kef->kblf", u_KBLE, as_array(low_B_C, x.dtype))
        low, B, C = jnp.split(mixed, (R, R + N), axis=-1)
        dt = jnp.einsum("kblr,kre->kble", low, as_array(of_low, x.dtype))
        if self.scan == "atrous" and (x.shape[1] % self.stride or x.shape[2] % self.stride):
            there = paths_2d(jnp.ones((1, *x.shape[1:3], 1)), **which)  # 0 where a path leaves the image
            dt = jnp.where(there > 0, dt, _STAND_STILL)
        A_log = self.param("A_log", _init_rates, (K, E, N), self.param_dtype).astype(accumulator(x.dtype))
        y = selective_scan_2d(
            u,
            dt,
            -jnp.exp(A_log),
            B,
            C,
            self.param("D", nn.initializers.ones, (K, E), self.param_dtype),
            **which,
            dt_bias=self.param("dt_bias", init_dt_bias, (K, E), self.param_dtype),
            dt_softplus=True,
            backend=self.backend,
        )
        y = nn.LayerNorm(**dtypes, name="norm")(y) * jax.nn.silu(z)
        return projection(width, scale=self.out_scale, **how, name="out")(y)


def check_image(x: Array) -> None:
    """Raise ValueError unless x is floating [B, H, W, C]."""
    if x.ndim != 4 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x: got {x.dtype}{list(x.shape)}; expected floating [batch, height, width, channels]"
        )


def _init_rates(key: Array, shape: tuple[int, int, int], dtype) -> Array:
    return jnp.broadcast_to(init_rates(key, shape[1:], dtype), shape)
