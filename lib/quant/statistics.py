"""Sums over the inputs of a matrix: all that GPTQ, AWQ and their kin need of the data."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..formats import QuantizedTensor
from ..kernels import grouped_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over the inputs x [K] of a matrix [K, N], in float32; stacked matrices have leading axes.

    Attributes:
      gram: the sum of x x^T, [..., K, K]: half of the Hessian of ||X W - X Q||^2 in a column of Q.
      total, total_abs: the sums of x and of |x|, [..., K].
      max_abs: the largest |x|, [..., K].
      count: how many inputs there were, [...].

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> statistics = frugax.quant.Statistics.of(jnp.array([[1.0, -2.0], [3.0, 0.0]]))
        >>> statistics.gram.tolist(), statistics.mean_abs.tolist(), int(statistics.rank)
        ([[10.0, -2.0], [-2.0, 4.0]], [2.0, 1.0], 2)
    """

    gram: Any
    total: Any
    total_abs: Any
    max_abs: Any
    count: Any

    @classmethod
    def of(cls, x: Float[Array, "... K"]) -> "Statistics":
        """Sum over all inputs of x [..., K]."""
        x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        gram = jnp.einsum("ti,tj->ij", x, x, precision="highest")
        magnitude = jnp.abs(x)
        count = jnp.asarray(x.shape[0], jnp.int32)
        return cls(gram, jnp.sum(x, 0), jnp.sum(magnitude, 0), jnp.max(magnitude, 0), count)

    @classmethod
    def of_groups(cls, x: Float[Array, "... K"], group_sizes: Int[Array, "E"]) -> "Statistics":
        """Sum over the rows of each group of x, stacked: those that each expert was sent.

        Args:
          x: rows [M, K] in the order of groups, as `frugax.moe.dispatch` sorts them, or slots [E, C, K].
          group_sizes: rows of each group; those past their sum, or later slots, count for none.

        Example:
            >>> import frugax, jax.numpy as jnp
            >>> x = jnp.array([[1.0, -2.0], [3.0, 0.0], [9.0, 9.0]])
            >>> statistics = frugax.quant.Statistics.of_groups(x, jnp.array([2, 0]))
            >>> statistics.gram.tolist(), statistics.count.tolist()
            ([[[10.0, -2.0], [-2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]], [2, 0])
        """
        E, K = len(group_sizes), x.shape[-1]
        x, sizes = x.astype(jnp.float32), group_sizes.astype(jnp.int32)
        if x.ndim == 3:
            used = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < sizes[:, None]
            found = jax.vmap(cls.of)(jnp.where(used[..., None], x, 0.0))
            return dataclasses.replace(found, count=jnp.minimum(sizes, x.shape[1]))
        row = jnp.arange(len(x), dtype=jnp.int32)
        group = jnp.searchsorted(jnp.cumsum(sizes, dtype=jnp.int32), row, side="right")  # E: of none
        # x_e^T x_e is the gradient of each group's matrix where x is that of the outputs.
        products = lambda w: grouped_matmul(x, w, sizes)  # noqa: E731
        (gram,) = jax.vjp(products, jnp.zeros((E, K, K), jnp.float32))[1](x)
        total, total_abs = (jax.ops.segment_sum(a, group, E + 1)[:E] for a in (x, jnp.abs(x)))
        max_abs = jnp.maximum(jax.ops.segment_max(jnp.abs(x), group, E + 1)[:E], 0.0)
        return cls(gram, total, total_abs, max_abs, jnp.minimum(sizes, len(x)))

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of these inputs and the other's."""
        return Statistics(
            self.gram + other.gram,
            self.total + other.total,
            self.total_abs + other.total_abs,
            jnp.maximum(self.max_abs, other.max_abs),
            self.count + other.count,
        )

    def divided(self, scale: Float[Array, "... K"]) -> "Statistics":
        """The statistics of x / scale, by positive scales [..., K]."""
        by = 1 / jnp.asarray(scale, jnp.float32)
        gram = self.gram * by[..., :, None] * by[..., None, :]
        return Statistics(gram, self.total * by, self.total_abs * by, self.max_abs * by, self.count)

    @property
    def mean(self) -> Array:
        """The mean of x, [..., K]."""
        return self.total / jnp.maximum(self.count, 1)[..., None].astype(jnp.float32)

    @property
    def mean_abs(self) -> Array:
        """The mean of |x|, [..., K]."""
        return self.total_abs / jnp.maximum(self.count, 1)[..., None].astype(jnp.float32)

    @property
    def rank(self) -> Array:
        """The largest rank that `gram` can have, [...]: below K, damping decides about the rest."""
        return jnp.minimum(self.count, self.gram.shape[-1])


def output_error(
    w: Float[Array, "... K N"], q: QuantizedTensor | Float[Array, "... K N"], statistics: Statistics
) -> Float[Array, "..."]:
    """Measure ||X W - X Q|| / ||X W|| over the inputs X that the statistics were taken of.

    Args:
      w: the matrix [..., K, N].
      q: what takes its place, quantized or an array.
      statistics: of its inputs.

    Raises:
      ValueError: shapes differ.

    Example:
        >>> import frugax, jax
        >>> x, w = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))
        >>> q = frugax.formats.quantize(w, "int8", group_size=32)
        >>> bool(frugax.quant.output_error(w, q, frugax.quant.Statistics.of(x)) < 0.01)
        True
    """
    q = q.dequantize(jnp.float32) if isinstance(q, QuantizedTensor) else q.astype(jnp.float32)
    check(w, statistics)
    if q.shape != w.shape:
        raise ValueError(f"q: got {list(q.shape)}; expected {list(w.shape)}, as w")
    w = w.astype(jnp.float32)
    gram = jnp.asarray(statistics.gram)
    error, whole = (jnp.sum(column_errors(d, gram), -1) for d in (w - q, w))
    return jnp.sqrt(error / jnp.where(whole == 0, 1.0, whole))


def column_errors(d: Array, gram: Array) -> Array:
    """Compute ||X d||^2 for each column of d [..., K, N]: d^T gram d, [..., N]."""
    product = jnp.einsum("...ij,...jn->...in", gram, d, precision="highest")
    return jnp.maximum(jnp.sum(d * product, -2), 0.0)


def known(w: Array, gram: Array) -> Array:
    """The matrix, or NaN where the statistics of its inputs are not finite, which no search would notice."""
    return jnp.where(jnp.isfinite(gram).all((-2, -1), keepdims=True), w, jnp.nan)


def check(w: Array, statistics: Statistics, name: str = "w") -> None:
    """Raise ValueError unless w [..., K, N] is floating and the statistics are of its inputs."""
    if w.ndim < 2 or 0 in w.shape or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: got {w.dtype}{list(w.shape)}; expected floats [..., K, N]")
    if not isinstance(statistics, Statistics):
        raise ValueError(f"statistics: got {type(statistics).__name__}; expected frugax.quant.Statistics")
    want = (*w.shape[:-1], w.shape[-2])
    if statistics.gram.shape != want:
        got = list(statistics.gram.shape)
        raise ValueError(f"statistics.gram: got {got}; expected {list(want)} for {name} {list(w.shape)}")
