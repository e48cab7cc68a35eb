"""The product of rows with the matrix of their group: the public function."""

from jaxtyping import Array, Float, Int

from ...formats import QuantizedTensor
from ..common.arguments import as_shaped
from ..common.operation import Backend, Operation
from .inputs import INDEPENDENT, argument_axes, check, result_axes

OPERATION = Operation("grouped_matmul", argument_axes, result_axes, independent=INDEPENDENT, static=("spec",))


def grouped_matmul(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "e k n"] | QuantizedTensor,
    group_sizes: Int[Array, "e"],
    *,
    gather: Int[Array, "m"] | None = None,
    scatter: Int[Array, "m"] | None = None,
    weights: Float[Array, "m"] | None = None,
    out_rows: int | None = None,
    rows_of: Int[Array, "t c"] | None = None,
    backend: Backend | None = None,
) -> Float[Array, "out n"]:
    """Multiply rows, sorted by group, each by the matrix of its group: y_i = x_i W_e(i).

    Args:
      lhs: the rows x [M, K]: first those of group 0, then those of group 1, and so on. With `gather`: tokens
        [T, K] in any order.
      rhs: the groups' matrices W [E, K, N], such as experts; floats in lhs's dtype, or packed in any format:
        `frugax.formats.quantize(W, "int4", axis=1)`.
      group_sizes: how many rows each group has, 0 or more. Rows past their sum give zeros, and get zero
        gradients.
      gather: row i is lhs[gather[i]]; lhs is not copied where a kernel reads its rows one by one.
      scatter: row i is added to the result's row scatter[i].
      weights: with `scatter`, what row i is multiplied with before.
      out_rows: rows of the result with `scatter`.
      rows_of: the inverse of `gather` or `scatter`, or of both where they are the same: the rows i of each
        token, each once; M or more where a token has fewer than others. Kernels then sum a token's rows by
        reading them, not by additions that may collide.
      backend: None picks by the platform the program is lowered for; or "reference", "xla", "pallas_tpu",
        "pallas_gpu". A Pallas backend named on CPU runs interpreted.

    Returns:
      y [M, N] in lhs's dtype, summed in float32 (float64 if lhs is); with `scatter` [out_rows, N].

    Raises:
      ValueError: naming the argument that can't be right, or the reason why a named backend can't serve.
        Values are seen outside of `jit` only. Inside, groups end at row M, a negative size is 0, a row that
        `gather` can't find is zero, and one that `scatter` can't place is left out; `checkify` (`all_checks`
        or `user_checks`) reports each.

    Differentiable in lhs, in float rhs and in weights; packed experts are constants.

    Source: Gale et al. 2022, MegaBlocks (arXiv 2211.15841); Tan et al. 2024, ScatterMoE (2403.08245).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> W = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> frugax.kernels.grouped_matmul(x, W, jnp.array([1, 2])).tolist()
        [[1.0, 2.0], [30.0, 40.0], [50.0, 60.0]]
    """
    rhs = rhs if isinstance(rhs, QuantizedTensor) else as_shaped(rhs)
    placed = as_shaped(gather), as_shaped(scatter), as_shaped(weights), out_rows, as_shaped(rows_of)
    call, spec = check(as_shaped(lhs), rhs, as_shaped(group_sizes), *placed)
    return OPERATION(call, backend, spec=spec)
