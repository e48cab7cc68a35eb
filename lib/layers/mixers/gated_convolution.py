"""A short causal convolution with a gate: Based's cheapest layer."""

from typing import NamedTuple

from flax import linen as nn
from jax import Array

from ..modules.short_conv import ShortConv
from .mixer import Mixer, RowArguments


class ConvolutionState(NamedTuple):
    """The convolution's last inputs [B, width - 1, expand * D]."""

    conv: Array


class GatedConvolution(Mixer):
    """y = W_out (silu(conv(W_1 x)) * W_2 x).

    Attributes:
      width: taps of the convolution.
      expand: channels of the convolution over the input's.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: BaseConv of Based, Arora et al. 2024 (arXiv 2402.18668), after H3 (2212.14052).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.GatedConvolution(width=3)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.conv.shape
        ((1, 7, 16), (1, 2, 32))
    """

    width: int = 3
    expand: int = 2

    @nn.compact
    def mix(
        self, x: Array, state: ConvolutionState | None, rows: RowArguments
    ) -> tuple[Array, ConvolutionState]:
        D = x.shape[-1]
        if self.expand < 1:
            raise ValueError(f"expand: got {self.expand}; expected a whole number >= 1")
        inner, gate = self.dense_parts(x, (self.expand * D,) * 2, "in_gate")
        before = None if state is None else state.conv
        conv = ShortConv(self.width, "silu", self.param_dtype, self.backend, name="conv")
        y, last = conv(inner, state=before, **rows)
        return self.output(y * gate, D), ConvolutionState(last)
