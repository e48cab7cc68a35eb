"""Learned rounding and corrected biases: what may follow once the scales are there."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jaxtyping import Float

from ..formats import Format, QuantizedTensor, format_named, from_codes
from ..formats.scales import split
from .gptq import check_matrix_format
from .statistics import Statistics, check, column_errors, known


def learned_rounding(
    w: Float[Array, "... K N"],
    statistics: Statistics,
    format: Format | str,
    *,
    group_size: int | None = None,
    start: QuantizedTensor | None = None,
    steps: int = 1000,
    learning_rate: float = 0.1,
    weight: float = 3.0,
) -> QuantizedTensor:
    """Quantize a matrix by learning for each weight whether to round it up or down (AdaRound).

    Of the two values around it a weight is near + h(v) (other - near), with h(v) = clip(1.2 sigmoid(v) - 0.1,
    0, 1). Adam minimizes ||X W - X Q||^2 plus `weight` times the sum of 1 - |2 h - 1|^beta, in which beta
    falls from 20 to 2, so that every h ends at 0 or 1. A column that does not gain by it is rounded to the
    nearest.

    Args:
      w: the matrix [..., K, N].
      statistics: of its inputs, stacked as w is.
      format: a format or its name.
      group_size: as in `frugax.formats.quantize`, whose scales the result has.
      start: w quantized by another method, such as `gptq`: its codes and scales take the place of the
        nearest ones, and a column that does not gain keeps them.
      steps, learning_rate: of Adam. The first fifth of the steps has no penalty.
      weight: of the penalty, where the error of rounding to the nearest counts as 1 for each weight.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization (arXiv
    2004.10568); for minifloats Aggarwal et al. 2023 (arXiv 2311.12359). The error is that over all inputs,
    from their Gram matrix, in place of batches of them.

    Example:
        >>> import frugax, jax
        >>> x, w = (jax.random.normal(jax.random.key(i), (64, 32)) for i in range(2))
        >>> x, w = x.cumsum(-1), w[:32]  # correlated channels
        >>> statistics = frugax.quant.Statistics.of(x)
        >>> q = frugax.quant.learned_rounding(w, statistics, "int4", steps=300)
        >>> nearest = frugax.formats.quantize(w, "int4")
        >>> mine, plain = (frugax.quant.output_error(w, a, statistics) for a in (q, nearest))
        >>> bool(mine < 0.6 * plain)
        True
    """
    format = format_named(format)
    check(w, statistics)
    check_matrix_format(format)
    if steps < 1:
        raise ValueError(f"steps: got {steps}; expected at least 1")
    group_size = format.group_of(group_size, w.shape[-2])
    if start is not None:
        how, asked = (start.format, start.group_size), (format, group_size)
        if start.shape != w.shape or start.axis != -2 or how != asked:
            raise ValueError(
                f"start: got {start.format.name}{list(start.shape)} in groups of {start.group_size} along "
                f"axis {start.axis}; expected {format.name}{list(w.shape)}, {group_size} along axis -2"
            )
    return _learn(w, jnp.asarray(statistics.gram), start, learning_rate, weight, format, group_size, steps)


@functools.partial(jax.jit, static_argnames=("format", "group_size", "steps"))
def _learn(w, gram, start, learning_rate, weight, format, group_size, steps) -> QuantizedTensor:
    def one(w, gram, start):
        w = known(w.astype(jnp.float32), gram)
        return _matrix(w, gram, start, learning_rate, weight, format, group_size, steps)

    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w, gram, start)


def _matrix(w, gram, first, learning_rate, weight, format: Format, g: int, steps: int) -> QuantizedTensor:
    K, N = w.shape
    x = split(w.T, g)  # [N, G, g]
    scaling = format.fit(x)
    if first is not None:  # where the statistics aren't known, w is NaN, and so are the scales that fit it
        is_known = jnp.isfinite(gram).all()
        scaling = jax.tree.map(lambda own, nan: jnp.where(is_known, own, nan), first.scaling(), scaling)
    near = format.encode(x, scaling) if first is None else split(first.unpacked(), g)
    other = format.next(near, x > format.decode(near, scaling), scaling)

    def matrix(values):
        return values.reshape(N, -1)[:, :K].T

    near_value, other_value = (matrix(format.decode(codes, scaling)) for codes in (near, other))
    gap = other_value - near_value
    # h is how far from the nearest value to the other one: at most a half, unless the codes were given.
    start = jnp.clip((w - near_value) / jnp.where(gap == 0, 1.0, gap), 0.0, 1.0)
    start = -jnp.log(1.2 / (start + 0.1) - 1)
    plain = column_errors(near_value - w, gram)
    unit = jnp.sum(plain) / w.size

    def h(v):
        return jnp.clip(1.2 * jax.nn.sigmoid(v) - 0.1, 0.0, 1.0)

    def loss(v, progress):
        error = jnp.sum(column_errors(near_value + h(v) * gap - w, gram)) / jnp.where(unit == 0, 1.0, unit)
        later = jnp.maximum(progress - 0.2, 0.0) / 0.8
        beta = 20.0 + (2.0 - 20.0) * later
        penalty = jnp.sum(1 - jnp.abs(2 * h(v) - 1) ** beta)
        return error + jnp.where(progress < 0.2, 0.0, weight) * penalty

    adam = optax.adam(learning_rate)

    def step(i, carry):
        v, state = carry
        updates, state = adam.update(jax.grad(loss)(v, i / steps), state)
        return optax.apply_updates(v, updates), state

    v, _ = lax.fori_loop(0, steps, step, (start, adam.init(start)))
    moved = h(v) > 0.5
    learned = column_errors(near_value + moved * gap - w, gram)
    moved = moved & (learned < plain)[None]
    codes = jnp.where(moved, matrix(other), matrix(near)).T
    return from_codes(codes, scaling, format, axis=-2, group_size=g)


def bias_correction(
    w: Float[Array, "... K N"], q: QuantizedTensor | Float[Array, "... K N"], statistics: Statistics
) -> Float[Array, "... N"]:
    """Find what to add to a layer's bias so that its mean output is that before quantization: E[x] (W - Q).

    Args:
      w: the matrix as it was.
      q: what takes its place: quantized to the nearest, by GPTQ or by learned rounding.
      statistics: of its inputs.

    Raises:
      ValueError: shapes differ.

    Source: Nagel et al. 2019, Data-Free Quantization (arXiv 1906.04721), section 4.2.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> w, x = jnp.array([[1.0], [0.4]]), jnp.array([[0.0, 1.0], [2.0, 3.0]])
        >>> q = frugax.formats.quantize(w, "mxfp4")
        >>> q.dequantize().tolist()
        [[1.0], [0.375]]
        >>> frugax.quant.bias_correction(w, q, frugax.quant.Statistics.of(x)).round(3)
        Array([0.05], dtype=float32)
    """
    check(w, statistics)
    q = q.dequantize(jnp.float32) if isinstance(q, QuantizedTensor) else q.astype(jnp.float32)
    if q.shape != w.shape:
        raise ValueError(f"q: got {list(q.shape)}; expected {list(w.shape)}, as w")
    lost = w.astype(jnp.float32) - q
    return jnp.einsum("...k,...kn->...n", statistics.mean, lost, precision="highest")
