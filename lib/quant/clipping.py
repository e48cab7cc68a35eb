"""Search for scales: weights are clipped where that makes the error of the layer's output less."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ..formats import Format, format_named
from ..formats.scales import split
from .statistics import Statistics, check, column_errors, known


def clip_weights(
    w: Float[Array, "... K N"],
    statistics: Statistics | None,
    format: Format | str,
    *,
    group_size: int | None = None,
    steps: int = 10,
    least: float = 0.55,
) -> Float[Array, "... K N"]:
    """Clip each group of a matrix to the range in which rounding costs the output least.

    For each group of a column, ranges from `least` times the largest magnitude up to it are tried, and the
    error of the group's share of the output is compared; then for each column, what it has of all groups
    together, with that of the column as it was. So rounding to the nearest is never worse than without.

    Args:
      w: the matrix [..., K, N].
      statistics: of its inputs; None compares squared errors of the weights.
      format: a format or its name, in which the result will be rounded to the nearest.
      group_size: as in `frugax.formats.quantize`.
      steps, least: how many ranges, and the least.

    Returns:
      The clipped matrix in w's dtype.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Lin et al. 2023, AWQ (arXiv 2306.00978), whose code tries 10 ranges from 0.55 on; the search of
    scales in Aggarwal et al. 2023 (arXiv 2311.12359) is that without statistics.

    Example:
        >>> import frugax, jax
        >>> w = jax.random.normal(jax.random.key(0), (64, 8))
        >>> clipped = frugax.quant.clip_weights(w, None, "int3")
        >>> q, plain = (frugax.formats.quantize(x, "int3").dequantize() for x in (clipped, w))
        >>> bool(((q - w) ** 2).sum() < 0.95 * ((plain - w) ** 2).sum())
        True
    """
    format = format_named(format)
    K = w.shape[-2]
    if statistics is None:
        gram = jnp.broadcast_to(jnp.eye(K, dtype=jnp.float32), (*w.shape[:-2], K, K))
    else:
        check(w, statistics)
        gram = jnp.asarray(statistics.gram)
    if steps < 1 or not 0 < least <= 1:
        raise ValueError(f"steps, least: got {steps}, {least}; expected steps >= 1 and 0 < least <= 1")
    group_size = format.group_of(group_size, K)
    return _clip(w, gram, format, group_size, steps, least)


@functools.partial(jax.jit, static_argnames=("format", "group_size", "steps", "least"))
def _clip(w, gram, format, group_size, steps, least) -> Array:
    def one(w, gram):
        x = known(w.astype(jnp.float32), gram)
        return clip_matrix(x, gram, format, group_size, steps, least).astype(w.dtype)

    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w, gram)


def nearest(w: Float[Array, "K N"], format: Format, g: int) -> Float[Array, "K N"]:
    """The values that rounding to the nearest gives."""
    x = split(w.T, g)
    scaling = format.fit(x)
    return format.decode(format.encode(x, scaling), scaling).reshape(len(x), -1)[:, : len(w)].T


def clip_matrix(
    w: Float[Array, "K N"], gram: Float[Array, "K K"], format: Format, g: int, steps: int, least: float
) -> Float[Array, "K N"]:
    """Do as `clip_weights` does with one matrix, without its checks."""
    K, N = w.shape
    x = split(w.T, g)  # [N, G, g]
    G = x.shape[1]
    padded = jnp.pad(gram, [(0, G * g - K)] * 2).reshape(G, g, G, g)
    own = jnp.einsum("gigj->gij", padded)  # the Gram matrix of each group's channels
    largest = jnp.max(jnp.abs(x), -1)

    def attempt(i, best):
        least_error, best_limit = best
        limit = largest * (1 - (1 - least) * i / max(steps - 1, 1))
        tried = jnp.clip(x, -limit[..., None], limit[..., None])
        scaling = format.fit(tried)
        d = format.decode(format.encode(tried, scaling), scaling) - x
        error = jnp.einsum("ngi,gij,ngj->ng", d, own, d, precision="highest")
        better = error < least_error
        return jnp.where(better, error, least_error), jnp.where(better, limit, best_limit)

    _, limit = lax.fori_loop(0, steps, attempt, (jnp.full((N, G), jnp.inf, jnp.float32), largest))
    clipped = jnp.clip(x, -limit[..., None], limit[..., None]).reshape(N, -1)[:, :K].T
    before, after = (column_errors(nearest(m, format, g) - w, gram) for m in (w, clipped))
    if not format.scheme.by_group:  # a column's scales depend on the others: all, or none
        before, after = jnp.sum(before, keepdims=True), jnp.sum(after, keepdims=True)
    return jnp.where((after < before)[None], clipped, w)
