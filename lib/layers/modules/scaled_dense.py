"""The projection back to the residual stream, whose initial gain a decoder chooses by its depth."""

from flax import linen as nn
from jax.typing import DTypeLike


def scaled_dense(
    features: int, scale: float, dtype: DTypeLike, param_dtype: DTypeLike, name: str
) -> nn.Dense:
    """A projection without bias whose initial gain is `scale`."""
    init = nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    return nn.Dense(
        features, use_bias=False, dtype=dtype, param_dtype=param_dtype, kernel_init=init, name=name
    )
