"""MLGRU: the token mixer of MatMul-free language models, an elementwise gated recurrence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import linear_recurrence
from ..modules.norms import RMSNorm
from ..modules.over_depth import ForgetFloors, floored_gate
from .mixer import Mixer, RowArguments


class MLGRUState(NamedTuple):
    """The last h [B, D]."""

    memory: Array


class MLGRU(Mixer):
    """h_t = f_t * h_{t-1} + (1 - f_t) * silu(W_c x_t);  y_t = W_out RMSNorm(sigmoid(W_g x_t) * h_t).

    f_t = floor + (1 - floor) sigmoid(W_f x_t). With `ternary=True`, as in the paper, the four matrices are
    `BitLinear`s, each with a norm and a scale of its own; otherwise the output's norm is the only one.

    Attributes: those of `Mixer`. The call also takes `floor` [D], values in [0, 1); None means 0.

    Source: MatMul-free LM, Zhu et al. 2024 (arXiv 2406.02528), with the floors of its code (HGRN's).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.MLGRU()
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape
        ((1, 7, 16), (1, 16))
    """

    over_depth = ForgetFloors

    @nn.compact
    def mix(
        self, x: Array, state: MLGRUState | None, rows: RowArguments, floor: Array | None = None
    ) -> tuple[Array, MLGRUState]:
        D = x.shape[-1]
        if self.ternary:
            f, c, g = (self.dense(x, D, name) for name in "fcg")
        else:
            f, c, g = self.dense_parts(x, (D, D, D), "fcg")
        wide = accumulator(x.dtype)  # near 1, bfloat16 can't tell a long memory from an endless one
        log_f, inward = floored_gate(f.astype(wide), floor)
        h, memory = linear_recurrence(
            jnp.exp(log_f),
            inward * jax.nn.silu(c.astype(wide)),
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o = jax.nn.sigmoid(g) * h.astype(x.dtype)
        if not self.ternary:  # a BitLinear norms by itself
            o = RMSNorm(param_dtype=self.param_dtype, name="norm")(o)
        return self.output(o, D), MLGRUState(memory)
