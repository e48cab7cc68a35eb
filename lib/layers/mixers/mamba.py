"""Mamba: a state-space model whose step, input and output maps are made from each token."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import selective_scan
from ..modules.norms import rms_normalize
from ..modules.short_conv import ShortConv
from .mixer import Mixer, RowArguments


class MambaState(NamedTuple):
    """The states of each channel [B, E, N], and the convolution's last inputs [B, conv_width - 1, E]."""

    memory: Array
    conv: Array


class Mamba(Mixer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = W_out ((C_t h_t + D u_t) * silu(z_t)).

    u = silu(conv(W_1 x)) and z = W_2 x have E = expand * width channels, each with `state_size` states.
    dt = softplus(W_4 W_3 u + b), B and C are projections of u, A = -exp(A_log) is learned.

    Attributes:
      expand: channels of the recurrence over the width.
      state_size: states of each channel, N.
      conv_width: taps of the causal convolution.
      dt_rank: columns of dt's first matrix; None means a sixteenth of the width, rounded up.
      inner_norm: epsilon of a norm without weights over B, over C and over dt's low rank, as FalconMamba has;
        None leaves it out.
      selective: False makes dt, B and C learned constants: from u to C h + D u the map is then linear and the
        same at all times, as in S4. To compare with, as the paper does.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: Gu and Dao 2023 (arXiv 2312.00752); the norms from FalconMamba, Zuo et al. 2024 (2410.05355).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.Mamba(state_size=4)
        >>> x = jnp.ones((1, 7, 16))
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), x)
        >>> y, state = mixer.apply(params, x[:, :1], state=state)  # the eighth token
        >>> y.shape, state.memory.shape, state.conv.shape
        ((1, 1, 16), (1, 32, 4), (1, 3, 32))
    """

    expand: int | float = 2
    state_size: int = 16
    conv_width: int = 4
    dt_rank: int | None = None
    inner_norm: float | None = None
    selective: bool = True

    @nn.compact
    def mix(self, x: Array, state: MambaState | None, rows: RowArguments) -> tuple[Array, MambaState]:
        width, N = x.shape[-1], self.state_size
        E = inner_width(width, self.expand)
        rank = math.ceil(width / 16) if self.dt_rank is None else self.dt_rank
        for name, size in (("state_size", N), ("dt_rank", rank)):
            if size < 1:
                raise ValueError(f"{name}: got {size}; expected a number >= 1")
        memory, conv = (None, None) if state is None else state

        u, z = self.dense_parts(x, (E, E), "in_gate")
        short_conv = ShortConv(self.conv_width, "silu", self.param_dtype, self.backend, True, name="conv")
        u, conv = short_conv(u, state=conv, **rows)
        dt, B, C = self._selected(u, rank) if self.selective else self._constant(u)

        A_log = self.param("A_log", init_rates, (E, N), self.param_dtype)
        y, memory = selective_scan(
            u,
            dt,
            -jnp.exp(A_log.astype(accumulator(x.dtype))),
            B,
            C,
            self.param("D", nn.initializers.ones, (E,), self.param_dtype),
            z=z,
            dt_bias=self.param("dt_bias", init_dt_bias, (E,), self.param_dtype),
            dt_softplus=True,
            initial_state=memory,
            **rows,
            backend=self.backend,
        )
        return self.output(y, width), MambaState(memory, conv)

    def _selected(self, u: Array, rank: int) -> tuple[Array, Array, Array]:
        """dt before its bias and softplus [B, T, E], B and C [B, T, N], from each token."""
        E, N = u.shape[-1], self.state_size
        low_B_C = jnp.split(self.dense(u, rank + 2 * N, "dt_B_C"), (rank, rank + N), axis=-1)
        if self.inner_norm is not None:
            low_B_C = [rms_normalize(y, self.inner_norm).astype(u.dtype) for y in low_B_C]
        low, B, C = low_B_C
        gain = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +- rank^-0.5
        return self.dense(low, E, "dt", kernel_init=gain), B, C

    def _constant(self, u: Array) -> tuple[Array, Array, Array]:
        """As `_selected`, but the same for all tokens; dt is its bias alone."""
        shape = (*u.shape[:2], self.state_size)
        inits = {"B": nn.initializers.ones, "C": nn.initializers.normal(1.0)}  # S4D's
        rows = [self.param(name, init, shape[2:], self.param_dtype) for name, init in inits.items()]
        B, C = (jnp.broadcast_to(row.astype(u.dtype), shape) for row in rows)
        return jnp.zeros_like(u), B, C


def inner_width(width: int, expand: int | float) -> int:
    """expand * width; ValueError naming expand unless that is a whole number >= 1."""
    inner = round(expand * width)
    if inner < 1 or abs(inner - expand * width) > 1e-6 * inner:  # a ratio may be off by its rounding
        raise ValueError(
            f"expand: got {expand}; expected a number that makes a whole one >= 1 of width {width}"
        )
    return inner


def init_rates(key: Array, shape: tuple[int, int], dtype) -> Array:
    """log of the rates 1..N of every channel (S4D-real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1)), shape).astype(dtype)


def init_dt_bias(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Inverse softplus of steps that are spread evenly on a log scale from 0.001 to 0.1."""
    log_dt = jax.random.uniform(key, shape, minval=math.log(0.001), maxval=math.log(0.1))
    dt = jnp.exp(log_dt)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)
