"""The product with a compressed ternary matrix, decoded a block of outputs at a time."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from ..kernels.common.arguments import accumulator, operand_dtype, pad_to
from ..kernels.grouped_matmul.bilinear import product
from .dictionary import CompressedTernary, decode_rows

DECODED = 2**18  # weights that are decoded at a time


def dictionary_matmul(
    x: Float[Array, "... K"],
    w: CompressedTernary,
    group_sizes: Int[Array, "E"] | None = None,
    *,
    block: int | None = None,
) -> Float[Array, "... N"]:
    """Multiply by a compressed ternary matrix: x W, with no more of W decoded than a block of its columns.

    Args:
      x: [..., K]; with a stack of matrices [E, K, N], the rows of each, [E, ..., K].
      w: from `compress_ternary`; a constant, without a gradient.
      group_sizes: with a stack, x is [M, K] in the order of experts, and so many rows belong to each; later
        ones give zeros. Of experts, those with rows are decoded, one at a time.
      block: without `group_sizes`, outputs that are decoded together; None: 2^18 weights of them.

    Returns:
      x W [..., N] in x's dtype, summed in float32. Decoding is done again for the gradient of x.

    Raises:
      ValueError: shapes do not match; the message names the argument.

    Source: Frantar & Alistarh 2023, QMoE (arXiv 2310.16795), section 4.3. The authors' CUDA kernel decodes
    and sums a row in a warp; this is a portable form.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> w, x = (jax.random.normal(jax.random.key(i), (256, 96)) for i in range(2))
        >>> q = frugax.formats.quantize(w, "ternary_minmax")
        >>> y = frugax.compress.dictionary_matmul(x[:, :96].T, frugax.compress.compress_ternary(q))
        >>> bool(jnp.allclose(y, x.T @ q.dequantize(), atol=1e-3))
        True
    """
    if not isinstance(w, CompressedTernary):
        raise ValueError(f"w: got {type(w).__name__}; expected a CompressedTernary (compress_ternary)")
    if group_sizes is not None:
        return _by_groups(x, w, group_sizes)
    stack = w.shape[:-2]
    K = w.inputs
    if x.ndim <= len(stack) or x.shape[: len(stack)] != stack or x.shape[-1] != K:
        expected = ", ".join(map(str, (*stack, "...", K)))
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected [{expected}] for w {list(w.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected a floating dtype")
    if block is not None and block < 1:
        raise ValueError(f"block: got {block}; expected at least 1")
    block = min(block or max(DECODED // K, 1), w.shape[-1])
    run = partial(_product, block)
    for _ in stack:
        run = partial(_one_by_one, run)
    y = run(x.reshape(*stack, -1, K), w)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def _by_groups(x: Array, w: CompressedTernary, group_sizes: Array) -> Array:
    E, M = w.shape[0], x.shape[0]
    if w.ndim != 3 or x.ndim != 2 or x.shape[1] != w.inputs or not jnp.issubdtype(x.dtype, jnp.floating):
        got = f"{x.dtype}{list(x.shape)} with group_sizes for w {list(w.shape)}"
        raise ValueError(f"x: got {got}; expected floats [M, K] for w [E, K, N]")
    if group_sizes.shape != (E,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        got = f"{group_sizes.dtype}{list(group_sizes.shape)}"
        raise ValueError(f"group_sizes: got {got}; expected integers [{E}]")
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0), dtype=jnp.int32), M)
    sizes = jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32))
    decode = _Expert(w.inputs, w.longest, operand_dtype(x.dtype))
    return product("rows", x, tuple(jax.tree.leaves(w)), sizes, decode).astype(x.dtype)


class _Expert(NamedTuple):
    """A function of an expert's number and the arrays of all: its matrix [K, N]."""

    inputs: int
    longest: int
    dtype: jnp.dtype

    def __call__(self, e: Array, *stacked: Array) -> Array:
        codes, offsets, low, high = (lax.dynamic_index_in_dim(x, e, keepdims=False) for x in stacked)
        return CompressedTernary(codes, offsets, low, high, self.inputs, self.longest).decode(self.dtype)


def _one_by_one(run, x: Array, w: CompressedTernary) -> Array:
    return lax.map(lambda pair: run(*pair), (x, w))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(block: int, x: Array, w: CompressedTernary) -> Array:
    """x W [T, N] of x [T, K]."""
    wide, operand = accumulator(x.dtype), operand_dtype(x.dtype)

    def part(rows):
        values = decode_rows(w, rows, operand)
        return _dot("tk,rk->tr", x.astype(operand), values, wide)

    y = lax.map(part, _blocks(w, block))  # [blocks, T, block]
    return jnp.moveaxis(y, 0, 1).reshape(len(x), -1)[:, : w.shape[-1]].astype(x.dtype)


def _forward(block: int, x: Array, w: CompressedTernary):
    return _product(block, x, w), (w, jnp.zeros(0, x.dtype))


def _backward(block: int, residuals, dy: Array):
    w, like = residuals
    wide, operand = accumulator(like.dtype), operand_dtype(like.dtype)
    rows = _blocks(w, block)
    dy = pad_to(dy.astype(operand), (len(dy), rows.size)).reshape(len(dy), *rows.shape)

    def add(dx, part):
        rows, dy = part
        return dx + _dot("tr,rk->tk", dy, decode_rows(w, rows, operand), wide), None

    dx, _ = lax.scan(add, jnp.zeros((len(dy), w.inputs), wide), (rows, jnp.moveaxis(dy, 1, 0)))
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    nothing = jax.tree.map(
        lambda x: jnp.zeros_like(x) if floats(x) else np.zeros(x.shape, jax.dtypes.float0), w
    )
    return dx.astype(like.dtype), nothing


_product.defvjp(_forward, _backward)


def _blocks(w: CompressedTernary, block: int) -> Array:
    """The columns of each block, [blocks, block]; those past the last are decoded as zeros."""
    count = -(-w.shape[-1] // block)
    return jnp.arange(count * block, dtype=jnp.int32).reshape(count, block)


def _dot(how: str, x: Array, y: Array, wide) -> Array:
    precision = "highest" if x.dtype == wide else None
    return jnp.einsum(how, x, y, precision=precision, preferred_element_type=wide)
