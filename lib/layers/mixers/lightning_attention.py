"""Lightning attention: linear attention with one fixed decay a head, and TransNormerLLM's block around it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import linear_attention
from ..block import Block
from ..modules.heads import head_size, merge_heads, split_heads
from ..modules.norms import SimpleRMSNorm
from ..modules.over_depth import LayerFraction
from ..modules.rotary import angles, positions
from .mixer import Mixer, RowArguments, summable


class LightningState(NamedTuple):
    """The matrix of each head [B, H, K, V], and how many tokens the document has (None without `lrpe`)."""

    memory: Array
    offset: Array | None


def decay_slopes(heads: int) -> np.ndarray:
    """-log of each head's decay in the first layer [H]: ALiBi's slopes, 2^(-8 h / H) for h in 1..H.

    Where H is no power of two, the slopes of the next smaller one are followed by every other slope of the
    next larger one.

    Raises:
      ValueError: heads below 1.

    Source: ALiBi (arXiv 2108.12409), as TransNormerLLM (2307.14995) uses them.

    Example:
        >>> import frugax
        >>> frugax.layers.decay_slopes(2).tolist(), frugax.layers.decay_slopes(3).tolist()
        ([0.0625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    if heads < 1:
        raise ValueError(f"heads: got {heads}; expected a number >= 1")
    whole = 2 ** (heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
    slopes += [2 ** (-8 * h / (2 * whole)) for h in range(1, 2 * whole + 1, 2)]
    return np.array(slopes[:heads])


class LightningAttention(Mixer):
    """S_t = exp(-slope) S_{t-1} + k_t v_t^T;  y_t = W_out (u_t * SimpleRMSNorm(q_t S_t)).

    q and k have gone through silu. Layer l of a decoder of L layers has slope * (1 - l / (L - 1) + 1e-5): the
    last ones hardly forget.

    Attributes:
      heads: divides the width.
      lrpe: give q and k positions, [x cos(t theta), x sin(t theta)] with theta learned, as TransNormerLLM
        does in its first layer. The heads' keys are twice as large.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    The call also takes `fraction`, the layer's place l / (L - 1) in its decoder; None means 0, the first.

    Source: TransNormerLLM (arXiv 2307.14995) and Lightning Attention (2405.17381), Qin et al.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.LightningAttention(heads=2)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape
        ((1, 7, 16), (1, 2, 8, 8))
    """

    heads: int = 4
    lrpe: bool = False

    over_depth = LayerFraction

    @nn.compact
    def mix(
        self, x: Array, state: LightningState | None, rows: RowArguments, fraction: Array | None = None
    ) -> tuple[Array, LightningState]:
        D, H = x.shape[-1], self.heads
        head_size("width", D, H)
        q, k, v, u = self.dense_parts(x, (D,) * 4, "qkvu")
        q_BTHK, k_BTHK, v_BTHV = (split_heads(y, H) for y in (jax.nn.silu(q), jax.nn.silu(k), v))

        offset = None
        if self.lrpe:
            place, offset = positions(None if state is None else state.offset, shape=x.shape[:2], **rows)
            theta_HK = self.param("theta", _init_theta, (H, D // H), self.param_dtype)
            angle = angles(place[:, :, None, None], theta_HK[None, None], accumulator(x.dtype))
            cos, sin = jnp.cos(angle), jnp.sin(angle)
            q_BTHK, k_BTHK = (
                jnp.concatenate([y.astype(cos.dtype) * part for part in (cos, sin)], axis=-1).astype(x.dtype)
                for y in (q_BTHK, k_BTHK)
            )

        slopes = jnp.asarray(decay_slopes(H), accumulator(x.dtype))
        log_decay_H = -slopes * (1 + 1e-5 - (0.0 if fraction is None else fraction))
        q_BTHK, k_BTHK, v_BTHV = summable(q_BTHK, k_BTHK, v_BTHV)
        o_BTHV, memory = linear_attention(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            log_decay_H,
            scale=1.0,
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        o = SimpleRMSNorm()(merge_heads(o_BTHV)).astype(x.dtype)
        return self.output(u * o, D), LightningState(memory, offset)


def _init_theta(key: Array, shape: tuple[int, int], dtype) -> Array:
    channels = shape[0] * shape[1]
    return (10000.0 ** (-2 * jnp.arange(channels) / channels)).reshape(shape).astype(dtype)


def transnormer_block(heads: int = 4, *, expand: int | float = 8 / 3, lrpe: bool = False) -> Block:
    """TransNormerLLM's layer: LightningAttention, then SGLU, each after a SimpleRMSNorm.

    Args:
      heads, lrpe: of the `LightningAttention`.
      expand: of the `GLU`.

    Source: TransNormerLLM (arXiv 2307.14995).

    Example:
        >>> import frugax
        >>> frugax.layers.transnormer_block(heads=8).norm
        'SimpleRMSNorm'
    """
    return Block(
        mixer="LightningAttention",
        channel="GLU",
        mixer_args={"heads": heads, "lrpe": lrpe},
        channel_args={"activation": None, "expand": expand},
        norm="SimpleRMSNorm",
    )
