"""A router ahead of a model, which chooses the experts of every layer before the first one runs."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ..mixers.sliding_window import SlidingWindowAttention
from ..modules.dense import Dense
from ..modules.norms import RMSNorm
from ..modules.packed import matrix_param, take_rows
from .mlp import MLP


class DecoupledRouter(nn.Module):
    """A small causal transformer from tokens to logits of experts, decoupled from the model that uses them.

    A token's choices depend on it and on earlier tokens alone, so they are known for all layers as soon as
    the token is. They tell which experts to fetch and which requests to batch. The model's layers of experts
    take them as `routing=`.

    Attributes:
      vocab_size: number of token ids.
      experts: E.
      layers: how many layers get choices of their own; None: one choice serves every layer, as the authors'.
      width: of the router; `heads` divides it.
      depth: blocks of attention and an MLP as wide as the router.
      heads, window: as in `SlidingWindowAttention`.
      dtype, param_dtype: as in `Decoder`.

    Args of the call:
      tokens: ids [B, T] in [0, vocab_size).
      state: what the last call returned, to go on from there; None starts afresh.
      segment_ids: the document of each token [B, T].

    Returns:
      logits in float32, [B, T, E] or with `layers` [B, T, layers, E], and the state.

    Raises:
      ValueError: tokens are no integers [B, T], or an attribute can't be right.

    Source: Cai et al. 2024, Read-ME (arXiv 2410.19123). There a token sees all earlier ones; here it does
    while they are fewer than `window`.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> router, tokens = frugax.layers.DecoupledRouter(vocab_size=10, experts=4), jnp.array([[3, 1, 4]])
        >>> (logits, _), _ = router.init_with_output(jax.random.key(0), tokens)
        >>> routing = frugax.moe.softmax_top_k(logits.reshape(-1, 4), 1)  # one expert, of weight 1
        >>> routing.weights.tolist()
        [[1.0], [1.0], [1.0]]
    """

    vocab_size: int
    experts: int
    layers: int | None = None
    width: int = 64
    depth: int = 2
    heads: int = 2
    window: int = 256
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Array, *, state: Any = None, segment_ids: Array | None = None
    ) -> tuple[Array, Any]:
        for name in ("vocab_size", "experts", "layers", "depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; expected at least 1")
        if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            got = f"{tokens.dtype}{list(tokens.shape)}"
            raise ValueError(f"tokens: got {got}; expected integers [batch, time >= 1]")
        table = (self.vocab_size, self.width)
        embedding = matrix_param(self, "embedding", nn.initializers.normal(1.0), table, self.param_dtype)
        known = jnp.where(tokens < 0, self.vocab_size, tokens)  # -1 is no id, not the last one
        x = take_rows(embedding, known, self.dtype)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        how = {"heads": self.heads, "window": self.window}
        before = (None,) * self.depth if state is None else state
        after = []
        for i in range(self.depth):
            normed = RMSNorm(**types, name=f"mixer_norm_{i}")(x)
            mixer = SlidingWindowAttention(**how, **types, name=f"mixer_{i}")
            y, now = mixer(normed, state=before[i], segment_ids=segment_ids)
            after.append(now)
            x = x + y
            normed = RMSNorm(**types, name=f"mlp_norm_{i}")(x)
            x = x + MLP(expand=1, activation="silu", **types, name=f"mlp_{i}")(normed)
        types["dtype"] = jnp.float32
        shape = (self.experts,) if self.layers is None else (self.layers, self.experts)
        logits = Dense(math.prod(shape), **types, name="out")(RMSNorm(**types, name="norm")(x))
        return logits.reshape(*tokens.shape, *shape), tuple(after)
