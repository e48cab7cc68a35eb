"""Scales by input channel: x / s times s W is x W, and one of them is easier to quantize.

Each rule here finds s [K]. `multiply_inputs` puts s in the matrix; `divide_outputs` puts 1 / s in what comes
before it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from .statistics import Statistics, check


def smoothquant_scale(
    w: Float[Array, "... K _"] | Sequence[Float[Array, "... K _"]],
    statistics: Statistics,
    *,
    alpha: float = 0.5,
) -> Float[Array, "... K"]:
    """Share the difficulty between activations and weights: s = max|x|^alpha / max|w|^(1 - alpha).

    Args:
      w: the matrix, or those that share an input.
      statistics: of the input.
      alpha: 0 leaves all of it with the activations, 1 gives all of it to the weights.

    Returns:
      s, to divide x by; 1 for a channel that is zero in x or in w.

    Raises:
      ValueError: shapes differ, or alpha is not from 0 to 1.

    Source: Xiao et al. 2022, SmoothQuant (arXiv 2211.10438), equation 4.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> statistics = frugax.quant.Statistics.of(jnp.array([[16.0, 1.0]]))
        >>> frugax.quant.smoothquant_scale(jnp.array([[0.25], [1.0]]), statistics).tolist()
        [8.0, 1.0]
    """
    matrices = as_matrices(w, statistics)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}; expected 0 to 1")
    of_x = jnp.asarray(statistics.max_abs)
    of_w = jnp.max(jnp.stack([jnp.max(jnp.abs(m.astype(jnp.float32)), -1) for m in matrices]), 0)
    known = (of_x > 0) & (of_w > 0)
    of_x, of_w = (jnp.where(known, a, 1.0) for a in (of_x, of_w))
    return of_x**alpha / of_w ** (1 - alpha)


def equalization_scale(
    first: Float[Array, "... J K"], second: Float[Array, "... K N"]
) -> Float[Array, "... K"]:
    """Find s for which the ranges of `first` / s and s `second` are equal in each channel between them.

    What stands between the two must let a positive factor through, as a ReLU or nothing does.

    Args:
      first: the matrix whose outputs the channels are.
      second: the matrix whose inputs they are.

    Returns:
      s = sqrt(max|first| / max|second|); 1 for a channel that is zero in one of them.

    Raises:
      ValueError: `first` has not as many outputs as `second` has inputs.

    Source: Nagel et al. 2019, Data-Free Quantization (arXiv 1906.04721), equation 11.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.quant.equalization_scale(jnp.array([[8.0, -1.0]]), jnp.array([[2.0], [1.0]])).tolist()
        [2.0, 1.0]
    """
    if first.ndim < 2 or second.ndim < 2 or first.shape[-1] != second.shape[-2]:
        raise ValueError(
            f"first, second: got {list(first.shape)}, {list(second.shape)}; expected [..., J, K], [..., K, N]"
        )
    a = jnp.max(jnp.abs(first.astype(jnp.float32)), -2)
    b = jnp.max(jnp.abs(second.astype(jnp.float32)), -1)
    known = (a > 0) & (b > 0)
    return jnp.sqrt(jnp.where(known, a, 1.0) / jnp.where(known, b, 1.0))


def multiply_inputs(w: Float[Array, "... K N"], scale: Float[Array, "... K"]) -> Float[Array, "... K N"]:
    """Multiply the rows of a matrix by the scales of its inputs, for inputs that `divide_outputs` divides.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.quant.multiply_inputs(jnp.ones((2, 1)), jnp.array([2.0, 3.0])).tolist()
        [[2.0], [3.0]]
    """
    return (w * scale[..., None]).astype(w.dtype)


def divide_outputs(params: Any, scale: Float[Array, "... K"]) -> Any:
    """Divide the outputs of a norm or a linear layer by scales: what makes up for `multiply_inputs` after it.

    Args:
      params: arrays with the outputs along their last axis, as the weight of a norm, a kernel and a bias
        have them; stacked as `scale` is. Of more outputs than there are scales the last are divided: the
        values of a GLU, whose gates come first.
      scale: positive, one for each output.

    Raises:
      ValueError: an array has fewer outputs than there are scales.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> norm = {"weight": jnp.array([1.0, 3.0])}
        >>> frugax.quant.divide_outputs(norm, jnp.array([2.0, 3.0]))["weight"].tolist()
        [0.5, 1.0]
    """
    K, stack = scale.shape[-1], scale.ndim - 1

    def divide(p):
        if p.ndim <= stack or p.shape[:stack] != scale.shape[:stack] or p.shape[-1] < K:
            raise ValueError(
                f"params: got {list(p.shape)}; expected [..., >= {K}] for scale {list(scale.shape)}"
            )
        by = jnp.concatenate([jnp.ones((*scale.shape[:-1], p.shape[-1] - K), scale.dtype), scale], -1)
        return (p / by.reshape(*scale.shape[:-1], *(1,) * (p.ndim - stack - 1), -1)).astype(p.dtype)

    return jax.tree.map(divide, params)


def as_matrices(w: Any, statistics: Statistics) -> tuple[Array, ...]:
    """The matrices that share an input, checked."""
    matrices = tuple(w) if isinstance(w, list | tuple) else (w,)
    if not matrices:
        raise ValueError("w: got no matrix; expected at least one")
    for i, matrix in enumerate(matrices):
        check(matrix, statistics, "w" if len(matrices) == 1 else f"w[{i}]")
    return matrices
