"""RWKV-5 (Eagle) time mixing: a fixed token shift, one learned decay and one bonus for every channel."""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class RWKVState(NamedTuple):
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
        self, x: Array, state: RWKVState | None, rows: RowArguments, fraction: Array | None = None
    ) -> tuple[Array, RWKVState]:
        D, H = x.shape[-1], self.heads
        K = head_size("width", D, H)
        start = Start(0.0 if fraction is None else fraction)

        before = None if state is None else state.last
        step = token_shift(x, before, rows["segment_ids"]) - x
        *mixed, w = self.mixed(x, step, start)
        r, k, v, g = (self.dense(y, D, name) for y, name in zip(mixed, "rkvg", strict=True))

        r_BTHK, k_BTHK, v_BTHV = summable(*(split_heads(y, H) for y in (r, k, v)))
        o_BTHV, memory = linear_attention(
            r_BTHK,
            k_BTHK,
            v_BTHV,
            split_heads(jnp.broadcast_to(log_decay(w), x.shape), H),
            bonus=self.started("bonus", start.bonus, (H, K), accumulator(x.dtype)),
            scale=1.0,
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o = merge_heads(HeadLayerNorm(param_dtype=self.param_dtype, name="norm")(o_BTHV)).astype(x.dtype)
        return self.output(o * jax.nn.silu(g), D), RWKVState(memory, last_output(x, before, **rows))

    def mixed(self, x: Array, step: Array, start: Start) -> tuple[Array, ...]:
        """The mixes that r, k, v and g read [B, T, D], and w [B or 1, T or 1, D]; x + step is the last x."""
        mu = self.started("mu", start.four_mixes, (4, x.shape[-1]), x.dtype)
        mixed = jnp.moveaxis(x[:, :, None] + step[:, :, None] * mu[None, None], 2, 0)
        return *mixed, self.started("decay", start.decay, x.shape[-1:], accumulator(x.dtype))[None, None]

    def started(self, name: str, init: Callable[..., Array], shape: tuple[int, ...], dtype: Any) -> Array:
        """A param that starts at `init`, in `dtype`."""
        return self.param(name, init, shape, self.param_dtype).astype(dtype)
