"""Products of rows in the order of experts, tile by tile: one tile of rows times one expert at a time.

Work is that of a dense product of as many rows, but for a group's last tile, which is as small as its rows
allow. Neither a copy of the rows for each expert is made, nor a copy of the experts: memory is that of the
result. `jax.lax.ragged_dot` makes E masked copies of the rows, and on CPU multiplies them all.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import accumulator, known, operand_dtype, pad_to, trim
from ..common.sharding import vary_like

# Rows of a tile, the last number, and those that a group's last tile may have. By measurement: of more rows
# the last tiles multiply more for nothing, of fewer a product is slower. A sum over rows adds a matrix for
# each tile.
OF_ROWS = (32, 64, 128, 192, 256)
OF_SUMS = (32, 64, 128, 256, 384, 512)


def by_rows(x: Array, matrix: Callable[[Array], Array], sizes: Array, N: int) -> Array:
    """Multiply row i by `matrix(e)` of its own group e: [M, N]; rows past all groups give zeros.

    Args:
      x: [M, K].
      matrix: e -> [K, N], for groups that have rows.
      sizes: int32 [E].
      N: columns of the result.
    """
    count, tile = x.shape[0], OF_ROWS[-1]
    x = _at_least(tile, x)
    M = x.shape[0]

    def group(e: Array, y: Array) -> Array:
        w = matrix(e)

        def whole(at: Array, y: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(y, _product(_rows(x, at, tile), w), at, 0)

        def last(at: Array, count: int, mine: Array, y: Array) -> Array:
            part = jnp.where(mine[:, None], _product(_rows(x, at, count), w), _rows(y, at, count))
            return lax.dynamic_update_slice_in_dim(y, part, at, 0)

        return _each_tile(OF_ROWS, sizes, e, M, y, whole, last)

    return trim(_each_group(sizes, jnp.zeros((M, N), accumulator(x.dtype)), group, (x, sizes)), (count, N))


def by_groups(x: Array, y: Array, sizes: Array) -> Array:
    """Sum the products x_i y_i^T over the rows of each group: [E, K, N]; zeros of empty groups."""
    tile = OF_SUMS[-1]
    x, y = _at_least(tile, x), _at_least(tile, y)
    M, dtype = x.shape[0], accumulator(x.dtype)
    shape = sizes.shape[0], x.shape[1], y.shape[1]

    def group(e: Array, sums: Array) -> Array:
        def whole(at: Array, sums: Array) -> Array:
            more = _product(_rows(x, at, tile).T, _rows(y, at, tile))
            return put(sums, lax.dynamic_index_in_dim(sums, e, keepdims=False) + more)

        def last(at: Array, count: int, mine: Array, sums: Array) -> Array:
            # Both: what isn't finite in another group's row stays there.
            left, right = (jnp.where(mine[:, None], _rows(a, at, count), 0) for a in (x, y))
            return put(sums, _product(left.T, right))  # the first of the group's: nothing to add to

        def put(sums: Array, total: Array) -> Array:
            return lax.dynamic_update_index_in_dim(sums, total, e, 0)

        return _each_tile(OF_SUMS, sizes, e, M, sums, whole, last)

    return _each_group(sizes, jnp.zeros(shape, dtype), group, (x, y, sizes))


def _each_group(sizes: Array, start: Array, group: Callable[[Array, Array], Array], like: Any) -> Array:
    """`group(e, state)` of each group e that has rows, one after the other."""

    def one(e: Array | int, state: Array) -> Array:
        e = jnp.asarray(e, jnp.int32)
        return _when(sizes[e] > 0, lambda zero, state: group(e + zero, state), state)

    return lax.fori_loop(0, sizes.shape[0], one, vary_like(start, like))


def _each_tile(
    heights: tuple[int, ...],
    sizes: Array,
    e: Array,
    M: int,
    state: Array,
    whole: Callable[[Array, Array], Array],
    last: Callable[[Array, int, Array, Array], Array],
) -> Array:
    """Visit the rows of group e: the last tile, which may have other groups' rows too, then those before it.

    Args:
      heights: rows of a tile, behind those that the last tile may have.
      sizes: int32 [E].
      e: the group.
      M: rows of all groups.
      state: what the visits change.
      whole: (first row, state) -> state, for a tile of this group's rows alone.
      last: (first row, rows, which of them are this group's, state) -> state.
    """
    tile = heights[-1]
    end = jnp.sum(jnp.where(jnp.arange(sizes.shape[0], dtype=jnp.int32) <= e, sizes, 0), dtype=jnp.int32)
    tiles, left = sizes[e] // tile, sizes[e] % tile
    start, rest = end - sizes[e], end - left
    fewer = 0
    for count in (*(n for n in heights if n < M), M) if known(M) and tile > M else heights:

        def visit(zero: Array | int, state: Array, count: int = count) -> Array:
            at = jnp.minimum(rest, M - count) + zero
            row = at + jnp.arange(count, dtype=jnp.int32)
            return last(at, count, (row >= rest) & (row < end), state)

        state = _when((left > fewer) & (left <= count), visit, state)
        fewer = count
    if not known(M) or tile <= M:
        state = lax.fori_loop(0, tiles, lambda i, state: whole(start + i * tile, state), state)
    return state


def _when(condition: Array, change: Callable[[Array | int, Array], Array], state: Array) -> Array:
    """`change(0, state)` if the condition holds, by a loop: XLA copies what a branch returns.

    The zero is the loop's counter: what does not depend on it XLA computes before the loop, even if none of
    its steps is taken.
    """
    return lax.fori_loop(0, condition.astype(jnp.int32), change, state)


def _at_least(tile: int, x: Array) -> Array:
    """x with a tile of zeros behind it where nobody knows how many rows it has, as in exported programs."""
    return x if known(x.shape[0]) else pad_to(x, (x.shape[0] + tile, *x.shape[1:]))


def _rows(x: Array, at: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, count, 0)


def _product(x: Array, y: Array) -> Array:
    operand = operand_dtype(x.dtype)
    dtype = accumulator(operand)
    x, y = x.astype(operand), y.astype(operand)
    return jnp.matmul(x, y, precision="highest", preferred_element_type=dtype)
