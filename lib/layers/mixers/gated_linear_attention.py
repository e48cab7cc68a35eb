"""Gated linear attention (GLA): a forget gate for every key channel, made from each token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import linear_attention
from ..modules.dense import split_columns
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.norms import GatedNorm
from ..modules.short_conv import ShortConv
from .mixer import Mixer, RowArguments, summable


class GLAState(NamedTuple):
    """The matrix of each head [B, H, K, V], and the convolution's last inputs (None without one)."""

    memory: Array
    conv: Array | None


class GatedLinearAttention(Mixer):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T;  y_t = W_out (RMSNorm(q_t S_t / sqrt(K)) * silu(W_g x_t)).

    The log of the gate is logsigmoid(W_2 W_1 x + b) / gate_temperature, with W_1 of `gate_rank` columns.

    Attributes:
      heads: divides both width * expand_k and width * expand_v.
      expand_k, expand_v: all heads' keys (values) together over the width.
      gate_rank: columns of the gate's first matrix.
      gate_temperature: what divides the gate's logsigmoid; larger forgets more slowly.
      conv_width: taps of a causal convolution with silu over q, k and v; None leaves it out.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: Yang et al. 2024 (arXiv 2312.06635).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.GatedLinearAttention(heads=2)
        >>> x = jnp.ones((1, 7, 16))
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), x)
        >>> y, state = mixer.apply(params, x[:, :1], state=state)  # the eighth token
        >>> y.shape, state.memory.shape
        ((1, 1, 16), (1, 2, 4, 8))
    """

    heads: int = 4
    expand_k: int | float = 0.5
    expand_v: int | float = 1.0
    gate_rank: int = 16
    gate_temperature: int | float = 16.0
    conv_width: int | None = None

    @nn.compact
    def mix(self, x: Array, state: GLAState | None, rows: RowArguments) -> tuple[Array, GLAState]:
        D, H = x.shape[-1], self.heads
        K = head_size("width * expand_k", D * self.expand_k, H)
        V = head_size("width * expand_v", D * self.expand_v, H)

        # One matrix for everything that reads x: q, k, v, the output's gate, the forget gate's low rank.
        sizes = (H * K, H * K, H * V)
        *qkv, gate, low = self.dense_parts(x, (*sizes, H * V, self.gate_rank), "qkv_gates")
        conv = None
        if self.conv_width is not None:
            conv_in = None if state is None else state.conv
            short_conv = ShortConv(self.conv_width, "silu", self.param_dtype, self.backend, name="conv")
            joined, conv = short_conv(jnp.concatenate(qkv, axis=-1), state=conv_in, **rows)
            qkv = split_columns(joined, sizes)
        q_BTHK, k_BTHK, v_BTHV = (split_heads(y, H) for y in qkv)
        forget = self.dense(low, H * K, "forget", use_bias=True)
        log_decay = jax.nn.log_sigmoid(forget.astype(accumulator(x.dtype))) / self.gate_temperature

        q_BTHK, k_BTHK, v_BTHV = summable(q_BTHK, k_BTHK, v_BTHV)
        o_BTHV, memory = linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            split_heads(log_decay, H),
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o_BTHV = GatedNorm(param_dtype=self.param_dtype, name="norm")(o_BTHV, *summable(split_heads(gate, H)))
        return self.output(merge_heads(o_BTHV).astype(x.dtype), D), GLAState(memory, conv)
