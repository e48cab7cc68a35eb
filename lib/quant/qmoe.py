"""QMoE: experts to ternary weights by GPTQ, made robust for experts that few tokens reach."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..formats import QuantizedTensor
from .gptq import gptq
from .statistics import Statistics, check


def qmoe(
    w: Float[Array, "... K N"], statistics: Statistics, *, damping: float = 0.1, least_inputs: int = 1
) -> QuantizedTensor:
    """Quantize experts so that each output's weights are its least one, zero, and its greatest.

    GPTQ with ten times its usual damping, for the Hessians of experts are of few tokens. An expert that saw
    fewer than `least_inputs` is rounded to the nearest.

    Args:
      w: experts [E, K, N], or any matrices.
      statistics: of the tokens that each expert was sent, from `calibrate` or `Statistics.of_groups`. Leave
        out of them what no expert should be tuned to, such as separators, by the router's mask.
      damping: as in `gptq`, relative to each Hessian's mean diagonal.
      least_inputs: the least number of tokens by which an expert is tuned.

    Returns:
      w in the format "ternary_minmax", one group for each output, which `frugax.compress.compress_ternary`
      stores in about 0.8 bits a weight where K is in the hundreds.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Frantar & Alistarh 2023, QMoE (arXiv 2310.16795), section 3.

    Example:
        >>> import frugax, jax
        >>> x, w = (jax.random.normal(jax.random.key(i), (2, 256, 64)) for i in range(2))
        >>> x, w = x.cumsum(-1), w[:, :64]  # correlated inputs of two experts
        >>> sizes = jax.numpy.array([256, 0])  # the second has none
        >>> statistics = frugax.quant.Statistics.of_groups(x[0], sizes)
        >>> q = frugax.quant.qmoe(w, statistics)
        >>> nearest = frugax.formats.quantize(w, "ternary_minmax", axis=-2)
        >>> mine, plain = (frugax.quant.output_error(w, a, statistics)[0] for a in (q, nearest))
        >>> bool(mine < 0.5 * plain), bool((q.dequantize()[1] == nearest.dequantize()[1]).all())
        (True, True)
    """
    check(w, statistics)
    if least_inputs < 0:
        raise ValueError(f"least_inputs: got {least_inputs}; expected at least 0")
    few = (jnp.asarray(statistics.count) < least_inputs)[..., None, None]
    uncorrelated = jnp.eye(w.shape[-2], dtype=jnp.float32)  # of which GPTQ rounds to the nearest
    robust = dataclasses.replace(statistics, gram=jnp.where(few, uncorrelated, statistics.gram))
    return gptq(w, robust, "ternary_minmax", damping=damping)
