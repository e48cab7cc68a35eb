"""Functions of SlimFit that keep few bits of their input for the backward pass, and compute exactly forwards.

They are for blocks of a model that `layerwise_step` trains: what a frozen block keeps for the gradient of
its input is then of 8 and 4 bits, or pruned. The formats are the authors' fixed points.

Source: Ardakani et al. 2023, SlimFit (arXiv 2305.18513), and its code.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@jax.custom_vjp
def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The exact GELU, with x kept in 4 bits: halves from -4 to 3.5, two in a byte.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from frugax.optim.layerwise import compressed
        >>> x = jnp.array([0.3, 10.0])
        >>> bool((compressed.gelu(x) == jax.nn.gelu(x, approximate=False)).all())
        True
        >>> jax.grad(lambda x: compressed.gelu(x).sum())(x).round(2).tolist()  # at 0.5 and at 3.5
        [0.8700000047683716, 1.0]
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x):
    codes = (jnp.clip(jnp.round(2 * x), -8, 7) + 8).astype(jnp.uint8).ravel()
    codes = jnp.pad(codes, (0, codes.size % 2))
    low, high = jnp.split(codes, 2)
    return gelu(x), low | (high << 4)


def _gelu_backward(packed, g):
    codes = jnp.concatenate([packed & 15, packed >> 4])[: g.size].reshape(g.shape)
    x = (codes.astype(g.dtype) - 8) / 2
    density = jnp.exp(-0.5 * x * x) / jnp.sqrt(2 * jnp.pi).astype(g.dtype)
    return (g * (jax.scipy.stats.norm.cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def matmul(a: Float[Array, "... m k"], b: Float[Array, "... k n"]) -> Float[Array, "... m n"]:
    """a @ b for two activations of the same batch axes, kept in 8 bits each: sixteenths from -8 to 7.9.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from frugax.optim.layerwise import compressed
        >>> a = jnp.array([[0.26, 1.0]])
        >>> jax.grad(lambda b: compressed.matmul(a, b).sum())(jnp.ones((2, 1)))[:, 0].tolist()
        [0.25, 1.0]
    """
    return a @ b


def _matmul_forward(a, b):
    return a @ b, (_eight_bits(a), _eight_bits(b))


def _matmul_backward(kept, g):
    a, b = (_from_eight_bits(x, g.dtype) for x in kept)
    return g @ jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2) @ g


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def softmax_matmul(scores: Float[Array, "... m k"], v: Float[Array, "... k n"]) -> Float[Array, "... m n"]:
    """softmax(scores) @ v, with probabilities kept in 8 bits without a sign (256ths) and v as by `matmul`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from frugax.optim.layerwise import compressed
        >>> scores, v = jnp.zeros((1, 3)), jnp.ones((3, 1))
        >>> jax.grad(lambda v: compressed.softmax_matmul(scores, v).sum())(v)[:, 0].tolist()  # 85 / 256
        [0.33203125, 0.33203125, 0.33203125]
    """
    return jax.nn.softmax(scores) @ v


def _softmax_matmul_forward(scores, v):
    p = jax.nn.softmax(scores)
    return p @ v, (jnp.clip(jnp.round(256 * p), 0, 255).astype(jnp.uint8), _eight_bits(v))


def _softmax_matmul_backward(kept, g):
    p, v = kept[0].astype(g.dtype) / 256, _from_eight_bits(kept[1], g.dtype)
    weighted = p * (g @ jnp.swapaxes(v, -1, -2))
    return weighted - p * jnp.sum(weighted, axis=-1, keepdims=True), jnp.swapaxes(p, -1, -2) @ g


softmax_matmul.defvjp(_softmax_matmul_forward, _softmax_matmul_backward)


def layer_norm(
    x: Float[Array, "... d"],
    scale: Float[Array, "d"],
    bias: Float[Array, "d"],
    *,
    share: float = 0.1,
    eps: float = 1e-12,
) -> Float[Array, "... d"]:
    """Layer norm, with just the largest of the normalized numbers kept for the gradient of x.

    The gradients of scale and bias are exact, where they are taken.

    Args:
      x: activations.
      scale, bias: of the norm.
      share: of each row's numbers that is kept, those of the largest magnitude (the authors take them over
        the whole array).
      eps: added to the variance.

    Example:
        >>> import jax.numpy as jnp
        >>> from frugax.optim.layerwise import compressed
        >>> compressed.layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2)).tolist()
        [[-1.0, 1.0]]
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}; expected a share in (0, 1]")
    scale, bias = (a.reshape((1,) * (x.ndim - 1) + a.shape) for a in (scale, bias))
    return _normalized(x, max(int(share * x.shape[-1]), 1), eps) * scale + bias


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalized(x, many, eps):
    return _normalize(x, eps)[0]


def _normalize(x, eps):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    spread = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    return centred * spread, spread


def _normalized_forward(x, many, eps):
    y, spread = _normalize(x, eps)
    where = jax.lax.top_k(jnp.abs(y), many)[1]
    largest = jnp.take_along_axis(y, where, axis=-1)
    narrow = jnp.uint16 if y.shape[-1] <= 2**16 else jnp.int32
    return y, (largest, where.astype(narrow), spread)


def _normalized_backward(many, eps, kept, g):
    largest, where, spread = kept
    # dx = spread * (g - mean(g) - y * mean(g * y)), y being zero where it wasn't kept
    chosen = jnp.take_along_axis(g, where.astype(jnp.int32), axis=-1)
    along = jnp.sum(chosen * largest, axis=-1, keepdims=True) / g.shape[-1]
    y = jnp.put_along_axis(jnp.zeros_like(g), where.astype(jnp.int32), largest, axis=-1, inplace=False)
    return (spread * (g - jnp.mean(g, axis=-1, keepdims=True) - y * along),)


_normalized.defvjp(_normalized_forward, _normalized_backward)


def _eight_bits(x):
    return jnp.clip(jnp.round(16 * x), -128, 127).astype(jnp.int8)


def _from_eight_bits(codes, dtype):
    return codes.astype(dtype) / 16
