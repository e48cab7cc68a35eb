"""The short causal convolution that mixers put before their recurrence."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ...kernels.common.operation import Backend
from ...parallel.over_time import causal_conv1d


class ShortConv(nn.Module):
    """Depthwise causal convolution over time: x [B, T, D] -> (y, state [B, width - 1, D]).

    Attributes:
      width: taps, >= 1.
      activation: "silu" or None.
      param_dtype, backend: as in `Mixer`.
      use_bias: a learned number for each channel, added before the activation.

    Source: H3, Fu et al. 2023 (arXiv 2212.14052).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> conv = frugax.layers.ShortConv(width=4)
        >>> (y, state), params = conv.init_with_output(jax.random.key(0), jnp.ones((1, 9, 3)))
        >>> y.shape, state.shape
        ((1, 9, 3), (1, 3, 3))
    """

    width: int = 4
    activation: str | None = "silu"
    param_dtype: DTypeLike = jnp.float32
    backend: Backend | None = None
    use_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        state: Array | None = None,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        segment_states: int | None = None,
    ) -> tuple[Array, Array]:
        if self.width < 1:
            raise ValueError(f"width: got {self.width}; expected a number of taps >= 1")
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=0, out_axis=1)
        weight = self.param("weight", init, (self.width, x.shape[-1]), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype).astype(x.dtype)
        return causal_conv1d(
            x,
            weight.astype(x.dtype),
            bias,
            activation=self.activation,
            initial_state=state,
            segment_ids=segment_ids,
            lengths=lengths,
            segment_states=segment_states,
            backend=self.backend,
        )
