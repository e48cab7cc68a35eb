"""BitLinear: a dense layer with weights -1, 0 and 1 and activations of 8 bits, trained straight through."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init
from flax.typing import Initializer
from jax import Array
from jax.typing import DTypeLike

from ...formats import QuantizedTensor, format_named
from ...kernels import quantized_matmul
from ...kernels.common.arguments import accumulator
from ...kernels.common.operation import Backend
from .inputs import beside
from .norms import rms_normalize
from .packed import matrix_param


class BitLinear(nn.Module):
    """y = s_x s_w (round(n / s_x) round(W / s_w)) + b, with n = RMSNorm(x): a product of whole numbers.

    s_w is the mean of |W| and s_x a 127th of the token's largest |n|; weights are clipped to -1, 0 and 1.
    Gradients pass straight through both roundings. For the backward pass x alone is kept: norm and codes are
    computed again. Packed by `frugax.quant.quantize_params(params, {"kernel$": "ternary"})`, W takes 2 bits a
    weight, and the layer gives the same y.

    Attributes:
      epsilon: of the norm.
      backend: handed to `frugax.kernels` where W is packed; None picks by platform.
      features, use_bias, dtype, param_dtype, kernel_init, bias_init: as in `flax.linen.Dense`.

    Source: Ma et al. 2024, BitNet b1.58 (arXiv 2402.17764), as in MatMul-free LM, Zhu et al. 2024
    (2406.02528), which fuses the norm.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> layer, x = frugax.layers.BitLinear(8), jnp.ones((2, 4))
        >>> y, variables = layer.init_with_output(jax.random.key(0), x)
        >>> packed, _ = frugax.quant.quantize_params(variables["params"], {"kernel": "ternary"})
        >>> bool((layer.apply({"params": packed}, x) == y).all())
        True
    """

    features: int
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    epsilon: float = 1e-8
    backend: Backend | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        gain = self.param("norm", nn.initializers.ones, shape[:1], self.param_dtype)
        kernel = matrix_param(self, "kernel", self.kernel_init, shape, self.param_dtype)
        x = x if self.dtype is None else x.astype(self.dtype)
        if isinstance(kernel, QuantizedTensor):
            normed = _norm(x, gain, self.epsilon)
            y = quantized_matmul(normed, kernel, activations="int8", backend=self.backend).astype(x.dtype)
        else:
            y = _bit_linear(x, gain, kernel, self.epsilon)
        if self.use_bias:
            y += beside(self.param("bias", self.bias_init, shape[1:], self.param_dtype).astype(y.dtype), y)
        return y


def _norm(x: Array, gain: Array, epsilon: float) -> Array:
    n = rms_normalize(x, epsilon)
    return n * beside(gain, n).astype(n.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _bit_linear(x: Array, gain: Array, W: Array, epsilon: float) -> Array:
    (n, s_x), (w, s_w) = _codes(_norm(x, gain, epsilon), "int8"), _codes(W.T, "ternary")
    # Whole numbers of at most 7 bits and their sums: exact in any dtype that floats have.
    y = jax.lax.dot_general(
        n.astype(x.dtype),
        w.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=accumulator(x.dtype),
    )
    return (y * s_x.astype(y.dtype) * s_w[0, 0].astype(y.dtype)).astype(x.dtype)


def _codes(x: Array, format: str) -> tuple[Array, Array]:
    """The values of the codes of x [..., K], each row a group, and what scales them [..., 1]."""
    chosen = format_named(format)
    groups = x[..., None, :].astype(jnp.float32)
    scaling = chosen.fit(groups)
    return chosen.element.decode(chosen.encode(groups, scaling))[..., 0, :], chosen.scale(scaling)


def _forward(x, gain, W, epsilon):
    return _bit_linear(x, gain, W, epsilon), (x, gain, W)


def _backward(epsilon, residuals, dy):
    x, gain, W = residuals
    normed, pull = jax.vjp(lambda x, gain: _norm(x, gain, epsilon), x, gain)
    (n, s_x), (w, s_w) = _codes(normed, "int8"), _codes(W.T, "ternary")
    n_hat, w_hat = (n * s_x).astype(dy.dtype), (w * s_w).astype(dy.dtype)
    wide = accumulator(dy.dtype)
    dn = jnp.matmul(dy, w_hat, preferred_element_type=wide)
    dW = jnp.tensordot(n_hat, dy, axes=(tuple(range(dy.ndim - 1)),) * 2, preferred_element_type=wide)
    return *pull(dn.astype(normed.dtype)), dW.astype(W.dtype)


_bit_linear.defvjp(_forward, _backward)
