"""Normalisations over the last axis, computed in float32 and returned in the input's dtype."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike

from ...kernels.common.arguments import accumulator
from .inputs import beside


def rms_normalize(x: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in float32 (float64 for float64)."""
    x = x.astype(accumulator(x.dtype))
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


class RMSNorm(nn.Module):
    """x / rms(x) times a learned weight.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> frugax.layers.RMSNorm().init_with_output(jax.random.key(0), jnp.array([3.0, 3.0]))[0].round(3)
        Array([1., 1.], dtype=float32)
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = rms_normalize(x, self.epsilon)
        return (y * beside(weight, y).astype(y.dtype)).astype(self.dtype or x.dtype)


class SimpleRMSNorm(nn.Module):
    """x / rms(x), with nothing to learn.

    Source: TransNormerLLM, Qin et al. 2023 (arXiv 2307.14995).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.layers.SimpleRMSNorm().apply({}, jnp.array([4.0, -4.0])).round(3)
        Array([ 1., -1.], dtype=float32)
    """

    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __call__(self, x: Array) -> Array:
        return rms_normalize(x, self.epsilon).astype(self.dtype or x.dtype)


class GatedNorm(nn.Module):
    """RMSNorm(x) * activation(gate): how a linear attention's heads leave the mixer.

    Args of the call: x [..., D], gate of the same shape. `affine=False` has no weight to learn.

    Source: RetNet (arXiv 2307.08621) and GLA (2312.06635), which norm each head and gate with silu.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jnp.array([3.0, -3.0])
        >>> frugax.layers.GatedNorm().init_with_output(jax.random.key(0), x, jnp.zeros(2))[0].tolist()
        [0.0, -0.0]
    """

    activation: Callable[[Array], Array] = jax.nn.silu
    affine: bool = True
    epsilon: float = 1e-6
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, gate: Array) -> Array:
        y = rms_normalize(x, self.epsilon)
        if self.affine:
            weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
            y = y * beside(weight, y).astype(y.dtype)
        return y.astype(x.dtype) * self.activation(gate)


class HeadLayerNorm(nn.Module):
    """LayerNorm of each head by itself, with one weight and one bias a channel: x [..., H, D].

    Source: the group norm of RWKV-6 (arXiv 2404.05892), whose epsilon is 64e-5.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
        >>> frugax.layers.HeadLayerNorm().init_with_output(jax.random.key(0), x)[0].round(2).tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]
    """

    epsilon: float = 64e-5
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        weight = self.param("weight", nn.initializers.ones, x.shape[-2:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-2:], self.param_dtype)
        y = x.astype(accumulator(x.dtype))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        weight, bias = (beside(p, y).astype(y.dtype) for p in (weight, bias))
        return (rms_normalize(y, self.epsilon) * weight + bias).astype(x.dtype)
