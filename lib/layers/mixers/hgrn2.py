"""HGRN2: gated linear attention whose key is what its forget gate lets go."""

from typing import NamedTuple

import jax
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import linear_attention
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.norms import RMSNorm
from ..modules.over_depth import ForgetFloors, floored_gate
from .mixer import Mixer, RowArguments, summable


class HGRN2State(NamedTuple):
    """The matrix of each head [B, H, K, K]."""

    memory: Array


class HGRN2(Mixer):
    """S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T;  y_t = W_out RMSNorm(silu(q_t) S_t / sqrt(K)).

    f_t = floor + (1 - floor) sigmoid(W_f x_t): higher layers have higher floors, so longer memories.

    Attributes:
      heads: divides the width; a head's share of it is how far the state expands each channel.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    The call also takes `floor` [D], values in [0, 1); None means 0.

    Source: Qin et al. 2024 (arXiv 2404.07904).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.HGRN2(heads=2)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape
        ((1, 7, 16), (1, 2, 8, 8))
    """

    heads: int = 4

    over_depth = ForgetFloors

    @nn.compact
    def mix(
        self, x: Array, state: HGRN2State | None, rows: RowArguments, floor: Array | None = None
    ) -> tuple[Array, HGRN2State]:
        D, H = x.shape[-1], self.heads
        head_size("width", D, H)
        q, f, i = self.dense_parts(x, (D, D, D), "qfi")
        log_f, k = floored_gate(f.astype(accumulator(x.dtype)), floor)
        q_BTHK, k_BTHK, v_BTHV = summable(
            *(split_heads(y, H) for y in (jax.nn.silu(q), k.astype(x.dtype), i))
        )
        o_BTHV, memory = linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            split_heads(log_f, H),
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o = RMSNorm(param_dtype=self.param_dtype, name="norm")(merge_heads(o_BTHV)).astype(x.dtype)
        return self.output(o, D), HGRN2State(memory)
