"""LMUFormer's sequence mixer: a Legendre memory between two dense layers, of floats or of spikes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...parallel.over_time import lmu
from ..modules.norms import RMSNorm
from ..modules.spiking import lif
from .mixer import Mixer, RowArguments


class LMUState(NamedTuple):
    """Each signal's memory [B, S, N]; of a spiking mixer also the potentials of its neurons, [B, n] each."""

    memory: Array
    potentials: tuple[Array, ...]


class LMU(Mixer):
    """u_t = relu(W_u x_t + b);  m_t = A m_{t-1} + B u_t;  y_t = W_out relu(W_h [m_t, x_t] + c).

    A and B are `frugax.kernels.lmu`'s: of each of the S signals u, m holds the last `theta` tokens as `order`
    coefficients. They are fixed, so a long call without segment_ids may be a convolution by FFT, and a stream
    a recurrence, with the same numbers.

    With `spiking`, x, u, m and what was relu's output are spikes of leaky integrate-and-fire neurons; m and
    W_h's output pass a norm before them.

    Attributes:
      order: coefficients a signal, N.
      theta: tokens that the memory spans, > 0.
      signals: how many projections of x are remembered, S.
      spiking: whether neurons that fire stand in place of relu. Their potentials are part of the state.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: Liu et al. 2024 (LMUFormer, arXiv 2402.04882), who have one signal, as many coefficients as
    channels (spiking: twice as many), and batch norm where here is a norm over each token's channels. They
    have one before u's neurons too: of one signal it is a scale and a shift, which W_u and b are here.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.LMU(order=8, theta=32.0)
        >>> x = jnp.ones((1, 40, 16))
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), x)
        >>> y, state = mixer.apply(params, x[:, :1], state=state)  # one token more
        >>> y.shape, state.memory.shape
        ((1, 1, 16), (1, 1, 8))
    """

    order: int = 64
    theta: float = 128.0
    signals: int = 1
    spiking: bool = False

    @nn.compact
    def mix(self, x: Array, state: LMUState | None, rows: RowArguments) -> tuple[Array, LMUState]:
        if self.signals < 1:
            raise ValueError(f"signals: got {self.signals}; expected a number >= 1")
        B, T, D = x.shape
        before = iter([None] * 4 if state is None else state.potentials)
        potentials = []

        def fire(current, threshold=1.0):
            spikes, v = lif(current, threshold=threshold, initial_state=next(before), **rows)
            potentials.append(v)
            return spikes

        if self.spiking:
            x = fire(x, 0.5)
        # A bias of 1 starts the neurons near their threshold: some tokens make them fire, others don't.
        bias = nn.initializers.constant(1.0 if self.spiking else 0.0)
        u = self.dense(x, self.signals, "signal", use_bias=True, bias_init=bias)
        u = fire(u) if self.spiking else jax.nn.relu(u)

        m, memory = lmu(
            u,
            self.order,
            self.theta,
            initial_state=None if state is None else state.memory,
            **rows,
        )
        m = m.reshape(B, T, -1)
        if self.spiking:
            m = fire(RMSNorm(param_dtype=self.param_dtype, name="memory_norm")(m))

        h = self.dense(jnp.concatenate([m, x], axis=-1), D, "hidden", use_bias=True)
        if self.spiking:
            h = fire(RMSNorm(param_dtype=self.param_dtype, name="hidden_norm")(h))
        else:
            h = jax.nn.relu(h)
        return self.output(h, D), LMUState(memory, tuple(potentials))
