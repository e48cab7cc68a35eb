"""Feature maps of linear attention: phi(q) . phi(k) stands for a kernel of q and k."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .packed import as_array, matrix_param


def elu_plus_one(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """elu(x) + 1, which is positive: x + 1 above 0, exp(x) below.

    Source: Katharopoulos et al. 2020 (arXiv 2006.16236).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.layers.elu_plus_one(jnp.array([0.0, 2.0])).tolist()
        [1.0, 3.0]
    """
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))  # -1 + 1 would lose what exp leaves


class LearnedMap(nn.Module):
    """softmax([W x, -W x]) for each head: x [..., H, D] -> positive features [..., H, 2 D].

    W starts as the identity.

    Source: Hedgehog, Zhang et al. 2024 (arXiv 2402.04347).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jnp.ones((5, 2, 4))  # 5 tokens, 2 heads
        >>> y, params = frugax.layers.LearnedMap().init_with_output(jax.random.key(0), x)
        >>> y.shape, params["params"]["kernel"].shape
        ((5, 2, 8), (2, 4, 4))
    """

    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        H, D = x.shape[-2:]

        def identity(key, shape, dtype):
            return jnp.broadcast_to(jnp.eye(D, dtype=dtype), shape)

        kernel = matrix_param(self, "kernel", identity, (H, D, D), self.param_dtype)
        y = jnp.einsum("...hd,hde->...he", x, as_array(kernel, x.dtype))
        return jax.nn.softmax(jnp.concatenate([y, -y], axis=-1), axis=-1)
