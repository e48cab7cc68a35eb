"""RWKV's channel mixing: a squared relu behind a token shift, weighed by a receptance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.rows import last_output
from ..mixers.mixer import Mixer, RowArguments
from ..modules.over_depth import LayerFraction
from ..modules.token_shift import Start, token_shift


class RWKVChannelState(NamedTuple):
    """The last input [B, D]."""

    last: Array


class RWKVChannel(Mixer):
    """y_t = sigmoid(W_r r_t) * W_v relu(W_k k_t)^2, with r and k mixes of this token and the last one.

    Each mix is x_t + (x_{t-1} - x_t) * mu with a learned mu. The state is the last token: a `Block` carries
    it beside its sequence mixer's.

    Attributes:
      expand: hidden width over the input's; the hidden width is rounded up to a multiple of 8.
      dtype, param_dtype, backend, out_scale, ternary: as in `Mixer`.

    The call also takes `fraction`, as `RWKV6`'s does.

    Source: Peng et al. 2024 (Eagle and Finch, arXiv 2404.05892), with its code's initial values of mu.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.RWKVChannel()
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.last.shape
        ((1, 7, 16), (1, 16))
    """

    expand: int | float = 3.5

    over_depth = LayerFraction

    @nn.compact
    def mix(
        self, x: Array, state: RWKVChannelState | None, rows: RowArguments, fraction: Array | None = None
    ) -> tuple[Array, RWKVChannelState]:
        if self.expand <= 0:
            raise ValueError(f"expand: got {self.expand}; expected a number above 0")
        D = x.shape[-1]
        hidden = -8 * (-round(self.expand * D) // 8)
        start = Start(0.0 if fraction is None else fraction)
        before = None if state is None else state.last
        step = token_shift(x, before, rows["segment_ids"]) - x
        mu_r, mu_k = (
            self.param(name, start.mix, (D,), self.param_dtype).astype(x.dtype)[None, None]
            for name in ("mu_r", "mu_k")
        )
        receptance = jax.nn.sigmoid(self.dense(x + step * mu_r, D, "r"))
        key = jnp.square(jax.nn.relu(self.dense(x + step * mu_k, hidden, "k")))
        value = self.dense(key, D, "v", scale=self.out_scale)
        return receptance * value, RWKVChannelState(last_output(x, before, **rows))
