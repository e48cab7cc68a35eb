"""QZO: the scales of quantized weights are tuned, their codes never change."""

from typing import Any

import jax
from jax import Array
from jaxtyping import Key

from ...formats import QuantizedTensor
from .directions import only
from .estimators import two_point
from .step import StepInfo, zo_step


def qzo_step(
    loss_fn,
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: float | Array,
    epsilon: float,
    clip: float | None = None,
) -> tuple[Any, StepInfo]:
    """A MeZO step of the quantization scales alone, with a clipped directional derivative.

    Args:
      loss_fn: params -> scalar, which dequantizes where it reads.
      params: a tree with `QuantizedTensor`s; what is not a scale of one stays as it is.
      key, learning_rate, epsilon: as in `mezo_step`.
      clip: the largest magnitude of the slope; a step can then not run away.

    Raises:
      ValueError: no leaf is the scale of a `QuantizedTensor`.

    Source: Shang et al. 2025, Fine-tuning Quantized Neural Networks with Zeroth-order Optimization
    (arXiv 2505.13430).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> w = frugax.formats.quantize(jnp.ones((8, 4)), "int4", group_size=4)
        >>> new, info = frugax.optim.zeroth_order.qzo_step(
        ...     lambda w: jnp.sum(w.dequantize() ** 2), w, jax.random.key(0),
        ...     learning_rate=1e-3, epsilon=1e-3, clip=10.0)
        >>> bool((new.codes == w.codes).all()), bool((new.scales == w.scales).any())
        (True, False)
    """
    is_leaf = lambda x: isinstance(x, QuantizedTensor)  # noqa: E731
    if not any(map(is_leaf, jax.tree.leaves(params, is_leaf=is_leaf))):
        raise ValueError("params: got no QuantizedTensor; expected at least one")
    scales = only(lambda path: path.split("/")[-1] == "scales")
    estimator = two_point(epsilon)
    return zo_step(
        loss_fn, params, key, learning_rate=learning_rate, estimator=estimator, direction=scales, clip=clip
    )
