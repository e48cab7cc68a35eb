"""Retention (RetNet): linear attention with rotary positions and one fixed decay a head."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import linear_attention
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.norms import GatedNorm
from ..modules.rotary import positions, rotary
from .mixer import Mixer, RowArguments, summable


class RetentionState(NamedTuple):
    """The matrix of each head [B, H, K, V], and how many tokens the document has [B]."""

    memory: Array
    offset: Array


class Retention(Mixer):
    """S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T;  y_t = W_out (norm(q_t S_t / sqrt(K)) * silu(W_g x_t)).

    q and k are turned by their positions (xPos is this turn together with the decay); the norm is each head's
    own, without weights.

    Attributes:
      heads: divides the width and width * expand_v; a head's share of the width is even.
      expand_v: all heads' values together over the width.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: RetNet, Sun et al. 2023 (arXiv 2307.08621).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.Retention(heads=2)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape, state.offset.tolist()
        ((1, 7, 16), (1, 2, 8, 16), [7])
    """

    heads: int = 4
    expand_v: int | float = 2.0

    @nn.compact
    def mix(self, x: Array, state: RetentionState | None, rows: RowArguments) -> tuple[Array, RetentionState]:
        D, H = x.shape[-1], self.heads
        head_size("width", D, H)
        values = H * head_size("width * expand_v", D * self.expand_v, H)
        q, k, v, gate = self.dense_parts(x, (D, D, values, values), "qkv_gate")
        place, offset = positions(None if state is None else state.offset, shape=x.shape[:2], **rows)
        q_BTHK, k_BTHK = (rotary(split_heads(y, H), place) for y in (q, k))

        log_decay_H = jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(H)))), accumulator(x.dtype))
        q_BTHK, k_BTHK, v_BTHV = summable(q_BTHK, k_BTHK, split_heads(v, H))
        o_BTHV, memory = linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            log_decay_H,
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o_BTHV = GatedNorm(affine=False, name="norm")(o_BTHV, *summable(split_heads(gate, H)))
        return self.output(merge_heads(o_BTHV).astype(x.dtype), D), RetentionState(memory, offset)
