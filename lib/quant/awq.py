"""AWQ: input channels with large activations are scaled up before their weights are rounded."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ..formats import Format, QuantizedTensor, format_named, quantize
from .clipping import clip_weights, nearest
from .scaling import as_matrices, multiply_inputs
from .statistics import Statistics, column_errors, known


class Awq(NamedTuple):
    """The result of `awq`.

    Attributes:
      weights: s W, quantized: one tensor, or a tuple where several matrices were given.
      scale: s [..., K], which what comes before is to be divided by (`divide_outputs`).
    """

    weights: QuantizedTensor | tuple[QuantizedTensor, ...]
    scale: Array


def awq(
    w: Float[Array, "... K _"] | Sequence[Float[Array, "... K _"]],
    statistics: Statistics,
    format: Format | str,
    *,
    group_size: int | None = None,
    grid: int = 20,
    clip: bool = True,
) -> Awq:
    """Quantize matrices with the channels that matter scaled up: (x / s) Q(s W) is near x W.

    Args:
      w: the matrix [..., K, N], or those that share an input: the projections behind one norm, say.
      statistics: of the input, stacked as w is.
      format: a format or its name.
      group_size: as in `frugax.formats.quantize`.
      grid: how many alpha are tried in s = mean|x|^alpha.
      clip: search for each group's range too (`clip_weights`). The authors leave queries and keys unclipped.

    Returns:
      Packed weights, and s, by which the caller divides the input: `divide_outputs` does so in the params of
      the norm or layer before. On the inputs of the statistics the output's error is that of rounding to the
      nearest at most, in all matrices together.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Lin et al. 2023, AWQ (arXiv 2306.00978). Errors are those of the matrices' outputs; the authors
    compare those of the block that they are in, where it has several.

    Example:
        >>> import frugax, jax
        >>> x, w = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))
        >>> x = x.at[:, 5].multiply(30)  # a salient channel
        >>> found = frugax.quant.awq(w, frugax.quant.Statistics.of(x), "int4", group_size=32)
        >>> y = (x / found.scale) @ found.weights.dequantize()
        >>> plain = x @ frugax.formats.quantize(w, "int4", group_size=32).dequantize()
        >>> bool(((y - x @ w) ** 2).sum() < 0.7 * ((plain - x @ w) ** 2).sum())
        True
    """
    format = format_named(format)
    matrices = as_matrices(w, statistics)
    scale = awq_scale(w, statistics, format, group_size=group_size, grid=grid)
    scaled = [multiply_inputs(m.astype(jnp.float32), scale) for m in matrices]
    if clip:
        divided = statistics.divided(scale)
        scaled = [clip_weights(m, divided, format, group_size=group_size) for m in scaled]
    stored = tuple(quantize(m, format, axis=-2, group_size=group_size) for m in scaled)
    return Awq(stored if isinstance(w, list | tuple) else stored[0], scale)


def awq_scale(
    w: Float[Array, "... K _"] | Sequence[Float[Array, "... K _"]],
    statistics: Statistics,
    format: Format | str,
    *,
    group_size: int | None = None,
    grid: int = 20,
) -> Float[Array, "... K"]:
    """Find AWQ's scales alone, s = mean|x|^alpha with the best alpha of 0, 1 / grid, ... below 1.

    With them `gptq(multiply_inputs(w, s), statistics.divided(s), ...)` is GPTQ after AWQ.

    Args: as in `awq`.

    Returns:
      s [..., K], of which the product of the largest and the least is 1; 1 for channels that are zero.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Lin et al. 2023, AWQ (arXiv 2306.00978), equation 5.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> statistics = frugax.quant.Statistics.of(jnp.array([[16.0, 1.0], [-16.0, 1.0]]))
        >>> s = frugax.quant.awq_scale(jnp.array([[0.3, 0.8], [1.0, -0.6]]), statistics, "int4")
        >>> s[0] > s[1], bool(abs(s[0] * s[1] - 1) < 1e-6)
        (Array(True, dtype=bool), True)
    """
    format = format_named(format)
    matrices = as_matrices(w, statistics)
    if grid < 1:
        raise ValueError(f"grid: got {grid}; expected at least 1")
    group_size = format.group_of(group_size, matrices[0].shape[-2])
    mean_abs, gram = statistics.mean_abs, jnp.asarray(statistics.gram)
    return _search(matrices, mean_abs, gram, format, group_size, grid)


@functools.partial(jax.jit, static_argnames=("format", "g", "grid"))
def _search(matrices, mean_abs, gram, format, g, grid) -> Array:
    def error(s, matrices, gram):
        # (s^-1 Q(s W) - W) for all matrices, on the inputs as they are
        rounded = [nearest(s[:, None] * m, format, g) / s[:, None] - m for m in matrices]
        return sum(jnp.sum(column_errors(d, gram)) for d in rounded)

    def one(matrices, mean_abs, gram):
        def attempt(i, best):
            least_error, best_scale = best
            s = _scale(mean_abs, i / grid)
            new = error(s, matrices, gram)
            return jnp.where(new < least_error, new, least_error), jnp.where(new < least_error, s, best_scale)

        start = jnp.asarray(jnp.inf, jnp.float32), jnp.ones(mean_abs.shape, jnp.float32)
        return known(lax.fori_loop(0, grid, attempt, start)[1][None], gram)[0]

    for _ in mean_abs.shape[:-1]:
        one = jax.vmap(one)
    return one(tuple(m.astype(jnp.float32) for m in matrices), mean_abs, gram)


def _scale(mean_abs: Float[Array, "K"], alpha: float | Array) -> Float[Array, "K"]:
    alive = mean_abs > 0
    s = jnp.maximum(jnp.where(alive, mean_abs, 1.0) ** alpha, 1e-4)
    most = jnp.max(jnp.where(alive, s, 0.0))
    least = jnp.min(jnp.where(alive, s, jnp.inf))
    return jnp.where(alive, s / jnp.sqrt(most * least), 1.0)
