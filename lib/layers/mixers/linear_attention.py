"""Linear attention of a feature map, normalised like softmax attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ...kernels.common.arguments import accumulator
from ...parallel.over_time import linear_attention
from ..modules.feature_maps import LearnedMap, elu_plus_one
from ..modules.heads import head_size, merge_heads, split_heads
from .mixer import Mixer, RowArguments, summable

FEATURE_MAPS = ("elu+1", "relu", "taylor", "learned")


class LinearAttentionState(NamedTuple):
    """The sums of phi(k) v^T and, where the output is normalised, of phi(k) as one more column of v."""

    memory: Array  # [B, H, features, V (+ 1)]


class LinearAttention(Mixer):
    """y_t = W_out sum_{s<=t} (phi(q_t) . phi(k_s)) v_s / sum_{s<=t} phi(q_t) . phi(k_s).

    Attributes:
      heads: divides the width.
      feature_map: phi; "elu+1", "relu", "taylor" (1 + q.k + (q.k)^2 / 2 with q.k over sqrt(key_size)), or
        "learned" (`LearnedMap`, one for q and one for k).
      key_size: channels of q and k in each head, before phi; None means width / heads, and 16 for "taylor".
      normalize: divide by the sum of the weights; without, the output is the sum over sqrt(features).
      epsilon: added to the sum of the weights.
      dtype, param_dtype, backend, out_scale: as in `Mixer`.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236); Based (2402.18668) for "taylor"; Hedgehog
    (2402.04347) for "learned".

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mixer = frugax.layers.LinearAttention(heads=2, feature_map="taylor", key_size=4)
        >>> (y, state), params = mixer.init_with_output(jax.random.key(0), jnp.ones((1, 7, 16)))
        >>> y.shape, state.memory.shape
        ((1, 7, 16), (1, 2, 15, 9))
    """

    heads: int = 4
    feature_map: str = "elu+1"
    key_size: int | None = None
    normalize: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def mix(
        self, x: Array, state: LinearAttentionState | None, rows: RowArguments
    ) -> tuple[Array, LinearAttentionState]:
        D, H = x.shape[-1], self.heads
        V = head_size("width", D, H)
        K = self.key_size or (16 if self.feature_map == "taylor" else V)
        qkv = self.dense_parts(x, (H * K, H * K, H * V), "qkv")
        q_BTHK, k_BTHK, v_BTHV = summable(*(split_heads(y, H) for y in qkv))
        q_BTHF, k_BTHF = self._features(q_BTHK, "q_map"), self._features(k_BTHK, "k_map")

        if self.normalize:  # a column of ones adds up the weights
            v_BTHV = jnp.concatenate([v_BTHV, jnp.ones_like(v_BTHV[..., :1])], axis=-1)
        o_BTHV, memory = linear_attention(
            q_BTHF,
            k_BTHF,
            v_BTHV,
            feature_map="taylor" if self.feature_map == "taylor" else None,
            scale=1.0 if self.normalize else None,
            initial_state=None if state is None else state.memory,
            **rows,
            backend=self.backend,
        )
        if self.normalize:
            o_BTHV, weight = o_BTHV[..., :-1], o_BTHV[..., -1:].astype(accumulator(x.dtype))
            o_BTHV = (o_BTHV.astype(weight.dtype) / (weight + self.epsilon)).astype(x.dtype)
        return self.output(merge_heads(o_BTHV).astype(x.dtype), D), LinearAttentionState(memory)

    def _features(self, x: Array, name: str) -> Array:
        if self.feature_map == "elu+1":
            return elu_plus_one(x)
        if self.feature_map == "relu":
            return jax.nn.relu(x)
        if self.feature_map == "taylor":
            return x * x.shape[-1] ** -0.25  # whose features `linear_attention` makes
        if self.feature_map == "learned":
            return LearnedMap(param_dtype=self.param_dtype, name=name)(x)
        raise ValueError(f"feature_map: got {self.feature_map!r}; expected one of {', '.join(FEATURE_MAPS)}")
