"""RWKV-6 (Finch) time mixing: data-dependent token shift, a decay for every channel, a bonus for now."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ..modules.inputs import beside
from ..modules.packed import as_array, matrix_param
from ..modules.token_shift import Start
from .rwkv5 import RWKV5


class RWKV6(RWKV5):
    """o_t = r_t (S_{t-1} + diag(u) k_t v_t^T);  S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t v_t^T.

    y_t = W_out (HeadLayerNorm(o_t) * silu(g_t)). Each of r, k, v, g and w reads its own mix of this token and
    the last one, x_t + (x_{t-1} - x_t) * (mu + tanh(x' A) B), where x' is mixed by one mu alone.

    Attributes:
      heads: divides the width.
      mix_rank, decay_rank: columns of A, and of the low-rank map that makes w.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    The call also takes `fraction`, the layer's place l / (L - 1) in its decoder, which sets how parameters
    start; None means 0, the first.

    Source: Peng et al. 2024 (arXiv 2404.05892), with its code's initial values, save that the low-rank maps'
    second matrices start at zero.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.RWKV6(heads=2)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape, state.last.shape
        ((1, 7, 16), (1, 2, 8, 8), (1, 16))
    """

    mix_rank: int = 32
    decay_rank: int = 64

    def mixed(self, x: Array, step: Array, start: Start) -> tuple[Array, ...]:
        D, wide = x.shape[-1], accumulator(x.dtype)
        first = x + step * beside(self.started("mu_x", start.mix, (D,), x.dtype), x)
        low = jnp.tanh(self.dense(first, 5 * self.mix_rank, "mix_in"))
        low = low.reshape(*x.shape[:2], 5, self.mix_rank)
        zeros = nn.initializers.zeros
        up = matrix_param(self, "mix_out", zeros, (5, self.mix_rank, D), self.param_dtype)
        mix = jnp.einsum("btnr,nrd->btnd", low, as_array(up, x.dtype))
        mix = mix + beside(self.started("mu", start.mixes, (5, D), x.dtype), mix)
        *mixed, w = jnp.moveaxis(x[:, :, None] + step[:, :, None] * mix, 2, 0)

        low = jnp.tanh(self.dense(w, self.decay_rank, "decay_in"))
        up = matrix_param(self, "decay_out", zeros, (self.decay_rank, D), self.param_dtype)
        w = (low @ as_array(up, x.dtype)).astype(wide)
        return *mixed, w + beside(self.started("decay", start.decay, (D,), wide), w)
