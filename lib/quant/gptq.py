"""GPTQ: rows of a matrix are rounded one by one, and those not yet rounded make up for the error."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ..formats import Format, QuantizedTensor, format_named, from_codes
from ..formats.scales import Scaling, split
from ..kernels.common.arguments import pad_to
from .statistics import Statistics, check


def gptq(
    w: Float[Array, "... K N"],
    statistics: Statistics,
    format: Format | str,
    *,
    group_size: int | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block: int = 128,
) -> QuantizedTensor:
    """Quantize a matrix so that X Q is near X W, for inputs X that the statistics were taken of.

    With H = X^T X + damping and the upper factor U of H^-1 = U^T U, for row k = 0 .. K - 1:

        q_k = round(w_k);  w_j -= U_kj (w_k - q_k) / U_kk  for all j > k

    in blocks of rows, each of which changes the rows behind it in one product. A channel that was zero in all
    inputs is rounded to the nearest. Where H can't be factored, damping grows tenfold until it can.

    Args:
      w: the matrix [..., K, N], for x @ w; stacked ones are quantized each by itself.
      statistics: of the inputs, from `calibrate` or `Statistics.of`, stacked as w is.
      format: a format or its name.
      group_size: rows that share a scale in a column; None: the format's own, or all.
      damping: what is added to the diagonal of H, in parts of its mean.
      act_order: begin with the rows of the largest inputs. Scales are those of static groups, so that the
        result needs no permutation.
      static_groups: scales of the matrix as it was; else each group has scales of its rows as they are when
        their turn comes. Formats whose scales depend on the whole matrix are always static.
      block: rows between two products; a multiple or a divisor of it that fits the groups is taken.

    Returns:
      What `frugax.formats.quantize(w, format, axis=-2, group_size=group_size)` returns, with other codes.

    Raises:
      ValueError: an argument is invalid; the message names it.

    Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323). The authors zero a dead channel and, in a group
    inside of a block, fit scales to rows that lack the block's errors; here they have them.

    Example:
        >>> import frugax, jax
        >>> x, w = (jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2))
        >>> x = x.cumsum(-1)  # correlated channels
        >>> statistics = frugax.quant.Statistics.of(x)
        >>> q = frugax.quant.gptq(w, statistics, "int4", group_size=32)
        >>> nearest = frugax.formats.quantize(w, "int4", group_size=32)
        >>> mine, plain = (frugax.quant.output_error(w, a, statistics) for a in (q, nearest))
        >>> bool(mine < 0.5 * plain)
        True
    """
    format = format_named(format)
    check(w, statistics)
    check_matrix_format(format)
    K = w.shape[-2]
    group_size = format.group_of(group_size, K)
    if block < 1:
        raise ValueError(f"block: got {block}; expected at least 1")
    if not isinstance(damping, Array) and not damping >= 0:
        raise ValueError(f"damping: got {damping}; expected a number >= 0")
    moving = not (static_groups or act_order or group_size == K or not format.scheme.by_group)
    return _gptq(w, statistics.gram, damping, format, group_size, act_order, moving, block)


def check_matrix_format(format: Format) -> None:
    """Raise ValueError for a format in which a code depends on its neighbours."""
    if format.paired:
        raise ValueError(f"format: got {format.name}, whose codes go by pairs; expected one code a value")


@functools.partial(jax.jit, static_argnames=("format", "group_size", "act_order", "moving", "block"))
def _gptq(w, gram, damping, format, group_size, act_order, moving, block) -> QuantizedTensor:
    def one(w, gram):
        return _matrix(w, gram, damping, format, group_size, act_order, moving, block)

    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w.astype(jnp.float32), jnp.asarray(gram, jnp.float32))


def _matrix(
    w: Array, gram: Array, damping, format: Format, g: int, act_order: bool, moving: bool, block: int
) -> QuantizedTensor:
    K, N = w.shape
    order = jnp.argsort(-jnp.diagonal(gram)) if act_order else jnp.arange(K)
    if act_order:
        gram = gram[order][:, order]
    U = inverse_factor(gram, damping)
    w = jnp.where(jnp.isfinite(U).all(), w, jnp.nan)  # no silent garbage where the statistics are NaN
    scaling = format.fit(split(w.T, g))

    # Blocks of B rows, each of parts: a part is a whole group, or lies inside of one.
    B = _block_rows(K, g, moving, block)
    part = min(B, g) if moving else B
    rows = -(-K // max(B, g)) * max(B, g) if moving else -(-K // B) * B
    w = pad_to(w[order], (rows, N))
    U = pad_to(U, (rows, rows)) + jnp.diag((jnp.arange(rows) >= K).astype(jnp.float32))
    group_of = pad_to(order // g, (rows,))
    if moving:  # the groups of padding have scales too, which nobody reads
        scaling = jax.tree.map(lambda x: pad_to(x, (*x.shape[:-1], rows // g)), scaling)

    def one_row(k, start, here, errors, codes, scaling):
        """Round row k, which is row k - start of the block, and correct the block's rows behind it."""
        i = k - start
        mine = take_group(scaling, group_of[k])
        code = format.encode(here[i][:, None, None], mine)
        error = (here[i] - format.decode(code, mine)[:, 0, 0]) / U[k, k]
        here = here - lax.dynamic_slice(U, (k, start), (1, B)).T * error[None]
        return here, errors.at[i].set(error), codes.at[k].set(code[:, 0, 0])

    def one_block(b, carry):
        w, codes, scaling = carry
        start = b * B
        here = lax.dynamic_slice_in_dim(w, start, B)

        def one_part(p, carry):
            *carry, scaling = carry
            first = start + p * part
            if moving:
                scaling = refit(scaling, w, carry[0], start, first)
            body = lambda k, carry: one_row(k, start, *carry, scaling)  # noqa: E731
            return *lax.fori_loop(first, first + part, body, tuple(carry)), scaling

        carry = here, jnp.zeros_like(here), codes, scaling
        here, errors, codes, scaling = lax.fori_loop(0, B // part, one_part, carry)
        behind = lax.dynamic_slice_in_dim(U, start, B)  # zero in rows before the block; its own are done
        w = w - jnp.einsum("bk,bn->kn", behind, errors, precision="highest")
        return w, codes, scaling

    def refit(scaling, w, here, start, first):
        """Fit the scales of the group that begins at row `first`, if one does."""

        def fit(scaling):
            group = here if part == g else w
            group = lax.dynamic_slice_in_dim(group, first - start if part == g else first, g)
            new = format.fit(group.T[:, None])
            put = lambda x, y: lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), first // g, -1)  # noqa: E731
            return jax.tree.map(put, scaling, new)

        return fit(scaling) if part == g else lax.cond(first % g == 0, fit, lambda s: s, scaling)

    codes = jnp.zeros((rows, N), jnp.int32)
    _, codes, scaling = lax.fori_loop(0, rows // B, one_block, (w, codes, scaling))
    codes = codes[:K] if not act_order else jnp.zeros((K, N), jnp.int32).at[order].set(codes[:K])
    if moving:
        scaling = jax.tree.map(lambda x: x[..., : -(-K // g)], scaling)
    return from_codes(codes.T, scaling, format, axis=-2, group_size=g)


def _block_rows(K: int, g: int, moving: bool, block: int) -> int:
    """Rows of a block: whole groups, or a whole part of one, where scales are found on the way."""
    if not moving:
        return min(block, K)
    if g <= block:
        return block // g * g
    return max(d for d in range(1, block + 1) if g % d == 0)


def take_group(scaling: Scaling, j: Array) -> Scaling:
    """The scaling of group j alone; arrays without an axis of groups stay."""

    def take(x):
        return x if x.shape[-1] == 1 else lax.dynamic_slice_in_dim(x, j, 1, -1)

    return jax.tree.map(take, scaling)


def inverse_factor(gram: Float[Array, "K K"], damping: float | Array) -> Float[Array, "K K"]:
    """The upper triangular U with U^T U = H^-1, H being the Gram matrix over its mean diagonal, damped.

    A dead channel has 1 on H's diagonal. From H = R R^T with R upper, which is the Cholesky factor of H read
    backwards, U = R^-1; H^-1 itself is not formed.
    """
    diagonal = jnp.diagonal(gram)
    alive = diagonal > 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1)
    H = gram / jnp.where(mean == 0, 1.0, mean)

    def factor(damping):
        damped = H + jnp.diag(jnp.where(alive, damping, 1.0))
        return jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]

    def more(state):
        damping = jnp.maximum(10 * state[0], 1e-6)
        return damping, factor(damping)

    start = jnp.asarray(damping, jnp.float32)
    failed = lambda state: ~jnp.isfinite(state[1]).all() & (state[0] < 1)  # noqa: E731
    _, R = lax.while_loop(failed, more, (start, factor(start)))
    return jax.scipy.linalg.solve_triangular(R, jnp.eye(len(R), dtype=R.dtype), lower=False)
