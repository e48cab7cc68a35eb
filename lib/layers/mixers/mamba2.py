"""Mamba-2: one rate a head, so that the state-space model is linear attention with a decay."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import ssd
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.norms import rms_normalize
from ..modules.short_conv import ShortConv
from .mamba import init_dt_bias, inner_width
from .mixer import Mixer, RowArguments, summable


class Mamba2State(NamedTuple):
    """The matrix of each head [B, H, N, P], and the last inputs of the convolution [B, W - 1, E + 2 G N]."""

    memory: Array
    conv: Array


class Mamba2(Mixer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t^T;  y_t = W_out RMSNorm((C_t h_t + D u_t) * silu(z_t)).

    u, B, C = silu(conv(W_1 x)), z = W_2 x, dt = softplus(W_3 x + b), A = -exp(A_log) and D one a head. u and
    z have E = expand * width channels, B and C `groups` sets of `state_size`; the norm is over each group's
    share of the channels.

    Attributes:
      heads: divides E.
      expand: channels of the recurrence over the width.
      state_size: columns of B and of C, N.
      groups: divides the heads; the heads of a group share B and C, and their norm.
      conv_width: taps of the causal convolution.
      norm_epsilon: of the norm.
      norm_before_gate: RMSNorm(C_t h_t + D u_t) * silu(z_t) in place of the norm behind the gate.
      dt_limit: the least and the largest step; steps beyond are set to them.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: Dao and Gu 2024 (arXiv 2405.21060).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.Mamba2(heads=2, state_size=4)
        >>> x = jnp.ones((1, 7, 16))
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), x)
        >>> y, state = mixer.apply(params, x[:, :1], state=state)  # the eighth token
        >>> y.shape, state.memory.shape, state.conv.shape
        ((1, 1, 16), (1, 2, 4, 16), (1, 3, 40))
    """

    heads: int = 4
    expand: int | float = 2
    state_size: int = 128
    groups: int = 1
    conv_width: int = 4
    norm_epsilon: float = 1e-5
    norm_before_gate: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)

    @nn.compact
    def mix(self, x: Array, state: Mamba2State | None, rows: RowArguments) -> tuple[Array, Mamba2State]:
        width, H, N, G = x.shape[-1], self.heads, self.state_size, self.groups
        E = inner_width(width, self.expand)
        head_size("width * expand", E, H)
        if N < 1:
            raise ValueError(f"state_size: got {N}; expected a number >= 1")
        if G < 1 or H % G:
            raise ValueError(f"groups: got {G}; expected a number >= 1 that divides heads = {H}")
        if not 0 <= self.dt_limit[0] < self.dt_limit[1]:
            raise ValueError(f"dt_limit: got {self.dt_limit}; expected 0 <= least < largest")
        memory, conv = (None, None) if state is None else state

        z, uBC, dt = self.dense_parts(x, (E, E + 2 * G * N, H), "gate_in_dt")
        short_conv = ShortConv(self.conv_width, "silu", self.param_dtype, self.backend, True, name="conv")
        uBC, conv = short_conv(uBC, state=conv, **rows)
        z, dt, *u_B_C = summable(z, dt, *jnp.split(uBC, (E, E + G * N), axis=-1))
        u, B, C = u_B_C

        A_log = self.param("A_log", _init_rates, (H,), self.param_dtype)
        dt_bias = self.param("dt_bias", init_dt_bias, (H,), self.param_dtype)
        step: dict[str, Any] = {"dt_bias": dt_bias, "dt_softplus": True}
        if tuple(self.dt_limit) != (0.0, math.inf):
            wide = accumulator(x.dtype)
            dt = jax.nn.softplus(dt.astype(wide) + dt_bias.astype(wide)[None, None])
            dt, step = jnp.clip(dt, *self.dt_limit).astype(u.dtype), {}
        y_BTHP, memory = ssd(
            split_heads(u, H),
            dt,
            -jnp.exp(A_log.astype(accumulator(x.dtype))),
            split_heads(B, G),
            split_heads(C, G),
            self.param("D", nn.initializers.ones, (H,), self.param_dtype),
            z=None if self.norm_before_gate else split_heads(z, H),
            **step,
            initial_state=memory,
            **rows,
            backend=self.backend,
        )
        y = merge_heads(rms_normalize(split_heads(merge_heads(y_BTHP), G), self.norm_epsilon))
        weight = self.param("norm", nn.initializers.ones, (E,), self.param_dtype)
        y = (y * weight.astype(y.dtype)[None, None]).astype(u.dtype)
        if self.norm_before_gate:
            y = y * jax.nn.silu(z)
        return self.output(y.astype(x.dtype), width), Mamba2State(memory, conv)


def _init_rates(key: Array, shape: tuple[int], dtype) -> Array:
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0)).astype(dtype)
