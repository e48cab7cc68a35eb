"""RWKV-5 (Eagle) time mixing: a fixed token shift, one learned decay and one bonus for every channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...kernels.common.rows import last_output
from ...parallel.over_time import linear_attention
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.norms import HeadLayerNorm
from ..modules.over_depth import LayerFraction
from ..modules.token_shift import Start, log_decay, token_shift
from .mixer import Mixer, RowArguments, summable


class RWKV5State(NamedTuple):
    """The matrix of each head [B, H, K, K], and the last input [B, D]."""

    memory: Array
    last: Array


class RWKV5(Mixer):
    """o_t = r_t (S_{t-1} + diag(u) k_t v_t^T);  S_t = diag(exp(-exp(w))) S_{t-1} + k_t v_t^T.

    y_t = W_out (HeadLayerNorm(o_t) * silu(g_t)). Each of r, k, v and g reads its own mix of this token and
    the last one, x_t + (x_{t-1} - x_t) * mu. Unlike RWKV-6's, neither mu nor w depends on the token.

    Attributes:
      heads: divides the width.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    The call also takes `fraction`, as `RWKV6`'s does.

    Source: Eagle in Peng et al. 2024 (arXiv 2404.05892), with its code's initial values of mu, w and u.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.RWKV5(heads=2)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape, state.last.shape
        ((1, 7, 16), (1, 2, 8, 8), (1, 16))
    """

    heads: int = 4

    over_depth = LayerFraction

    @nn.compact
    def mix(
        self, x: Array, state: RWKV5State | None, rows: RowArguments, fraction: Array | None = None
    ) -> tuple[Array, RWKV5State]:
        D, H = x.shape[-1], self.heads
        K = head_size("width", D, H)
        start = Start(0.0 if fraction is None else fraction)

        before = None if state is None else state.last
        step = token_shift(x, before, rows["segment_ids"]) - x
        mu = self.param("mu", start.four_mixes, (4, D), self.param_dtype).astype(x.dtype)
        mixed = jnp.moveaxis(x[:, :, None] + step[:, :, None] * mu[None, None], 2, 0)
        r, k, v, g = (self.dense(y, D, name) for y, name in zip(mixed, "rkvg", strict=True))

        wide = accumulator(x.dtype)
        w = self.param("decay", start.decay, (D,), self.param_dtype).astype(wide)
        decay_BTD = jnp.broadcast_to(log_decay(w)[None, None], x.shape)
        r_BTHK, k_BTHK, v_BTHV = summable(*(split_heads(y, H) for y in (r, k, v)))
        o_BTHV, memory = linear_attention(
            r_BTHK,
            k_BTHK,
            v_BTHV,
            split_heads(decay_BTD, H),
            bonus=self.param("bonus", start.bonus, (H, K), self.param_dtype).astype(wide),
            scale=1.0,
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o = merge_heads(HeadLayerNorm(param_dtype=self.param_dtype, name="norm")(o_BTHV)).astype(x.dtype)
        return self.output(o * jax.nn.silu(g), D), RWKV5State(memory, last_output(x, before, **rows))
