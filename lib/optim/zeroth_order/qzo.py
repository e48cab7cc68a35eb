"""QZO: the scales of quantized weights are tuned, their codes and codebooks never change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Key

from .directions import leaves_with_paths, only
from .estimators import two_point
from .step import Rate, StepInfo, zo_step


def is_scale(path: str) -> bool:
    """Find the scales of `QuantizedTensor`s, and of any dict or class that keeps them as "scales"."""
    return path.split("/")[-1] == "scales"


def positive_scales(params: Any, where: Callable[[str], bool] = is_scale) -> Any:
    """Raise scales below the smallest normal number to it: a weight never changes its sign.

    Args:
      params: a tree with scales.
      where: a leaf's path -> whether it is a scale.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> frugax.optim.zeroth_order.positive_scales({"scales": jnp.array([-0.6, 2.0])})["scales"].tolist()
        [1.1754943508222875e-38, 2.0]
    """
    leaves = [
        jnp.maximum(x, jnp.finfo(x.dtype).tiny) if where(p) else x for p, x in leaves_with_paths(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def qzo_step(
    loss_fn: Callable[[Any], Array],
    params: Any,
    key: Key[Array, ""],
    *,
    learning_rate: Rate,
    epsilon: float,
    clip: float | None = 100.0,
    where: Callable[[str], bool] = is_scale,
    **options: Any,
) -> tuple[Any, StepInfo]:
    """A MeZO step of the quantization scales alone, with a clipped directional derivative.

    scales <- max(scales - learning_rate * clip(slope) z, smallest normal number): they stay positive. So
    `replay(..., epsilon=epsilon, direction=only(where), project=positive_scales)` rebuilds a run.

    Args:
      loss_fn: params -> scalar, which dequantizes where it reads.
      params: a tree with `QuantizedTensor`s of any format, or with codes, codebooks and scales in containers
        of your own (as of AQLM). What is no scale stays as it is.
      key, learning_rate, epsilon: as in `mezo_step`.
      clip: the largest magnitude of the slope; a step can then not run away. None: any.
      where: a leaf's path -> whether it is a scale.
      **options: count, weight_decay and decays of `zo_step`.

    Raises:
      ValueError: no leaf is a scale.

    Source: Shang et al. 2025, Fine-tuning Quantized Neural Networks with Zeroth-order Optimization
    (arXiv 2505.13430); the clip of 100 is that of its code, where scales stay above 1e-7.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> w = frugax.formats.quantize(jnp.ones((8, 4)), "int4", group_size=4)
        >>> new, info = frugax.optim.zeroth_order.qzo_step(
        ...     lambda w: jnp.sum(w.dequantize() ** 2), w, jax.random.key(0),
        ...     learning_rate=1e-3, epsilon=1e-3, clip=10.0)
        >>> bool((new.codes == w.codes).all()), bool((new.scales == w.scales).any())
        (True, False)
    """
    paths = [path for path, _ in leaves_with_paths(params)]
    if not any(map(where, paths)):
        raise ValueError(f"params: got {', '.join(paths)}, no scales; expected a QuantizedTensor's or others")
    params, info = zo_step(
        loss_fn,
        params,
        key,
        learning_rate=learning_rate,
        estimator=two_point(epsilon),
        direction=only(where),
        clip=clip,
        **options,
    )
    return positive_scales(params, where), info
