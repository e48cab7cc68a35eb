"""The embedding that 8-bit optimizers are stable with."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


class StableEmbedding(nn.Module):
    """Token embeddings drawn Xavier-uniformly, with a layer norm right after them.

    The norm keeps gradients of rare and frequent tokens alike in size. The table's optimizer state is to stay
    in float32: `frugax.optim.EightBit(full_precision=frugax.optim.is_embedding)`.

    Attributes:
      vocabulary: rows of the table.
      features: of a token.
      dtype: of the output; parameters are float32.

    Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> module = frugax.layers.StableEmbedding(vocabulary=10, features=4)
        >>> out, _ = module.init_with_output(jax.random.key(0), jnp.arange(6)[None])
        >>> out.shape, bool(abs(out.mean()) < 1e-6)
        ((1, 6, 4), True)
    """

    vocabulary: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... d"]:
        """The normalized embedding of each token."""
        embed = nn.Embed(
            self.vocabulary, self.features, embedding_init=nn.initializers.xavier_uniform(), name="embed"
        )
        return nn.LayerNorm(dtype=self.dtype, name="norm")(embed(tokens))
