"""RWKV-6 (Finch) time mixing: data-dependent token shift, a decay for every channel, a bonus for now."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...kernels.common.rows import last_output
from ...parallel.over_time import linear_attention
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.inputs import beside
from ..modules.norms import HeadLayerNorm
from ..modules.over_depth import LayerFraction
from ..modules.packed import as_array, matrix_param
from ..modules.token_shift import Start, log_decay, token_shift
from .mixer import Mixer, RowArguments, summable


class RWKV6State(NamedTuple):
    """The matrix of each head [B, H, K, K], and the last input [B, D]."""

    memory: Array
    last: Array


class RWKV6(Mixer):
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

    heads: int = 4
    mix_rank: int = 32
    decay_rank: int = 64

    over_depth = LayerFraction

    @nn.compact
    def mix(
        self, x: Array, state: RWKV6State | None, rows: RowArguments, fraction: Array | None = None
    ) -> tuple[Array, RWKV6State]:
        D, H = x.shape[-1], self.heads
        K = head_size("width", D, H)
        start = Start(0.0 if fraction is None else fraction)

        before = None if state is None else state.last
        step = token_shift(x, before, rows["segment_ids"]) - x
        mixed = x + step * beside(self._param("mu_x", start.mix, (D,), x.dtype), x)
        low = jnp.tanh(self.dense(mixed, 5 * self.mix_rank, "mix_in"))
        low = low.reshape(*x.shape[:2], 5, self.mix_rank)
        zeros = nn.initializers.zeros
        up = matrix_param(self, "mix_out", zeros, (5, self.mix_rank, D), self.param_dtype)
        mix = jnp.einsum("btnr,nrd->btnd", low, as_array(up, x.dtype))
        mix = mix + beside(self._param("mu", start.mixes, (5, D), x.dtype), mix)
        r, k, v, g, w = jnp.moveaxis(x[:, :, None] + step[:, :, None] * mix, 2, 0)

        r, k, v, g = (self.dense(y, D, name) for y, name in ((r, "r"), (k, "k"), (v, "v"), (g, "g")))
        wide = accumulator(x.dtype)
        low = jnp.tanh(self.dense(w, self.decay_rank, "decay_in"))
        up = matrix_param(self, "decay_out", zeros, (self.decay_rank, D), self.param_dtype)
        w = low @ as_array(up, x.dtype)
        w = w.astype(wide) + beside(self._param("decay", start.decay, (D,), wide), w)
        u_HK = self._param("bonus", start.bonus, (H, K), wide)

        r_BTHK, k_BTHK, v_BTHV = summable(*(split_heads(y, H) for y in (r, k, v)))
        o_BTHV, memory = linear_attention(
            r_BTHK,
            k_BTHK,
            v_BTHV,
            split_heads(log_decay(w), H),
            bonus=u_HK,
            scale=1.0,
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o = merge_heads(HeadLayerNorm(param_dtype=self.param_dtype, name="norm")(o_BTHV)).astype(x.dtype)
        return self.output(o * jax.nn.silu(g), D), RWKV6State(memory, last_output(x, before, **rows))

    def _param(self, name: str, init, shape: tuple[int, ...], dtype) -> Array:
        return self.param(name, init, shape, self.param_dtype).astype(dtype)
