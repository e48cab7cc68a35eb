"""Products of rows in the order of experts, tile by tile: one tile of rows times one expert at a time.

Work is that of a dense product of as many rows, but for a group's last tile, which is as small as its rows
allow. Neither a copy of the rows for each expert is made, nor a copy of the experts: memory is that of the
result. A tile's rows may be read from anywhere and added to anywhere, so that no sorted copy of them exists.
`jax.lax.ragged_dot` makes E masked copies of the rows, and on CPU multiplies them all.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import accumulator, known, operand_dtype, trim
from ..common.sharding import vary_like
from ..common.tiling import round_up

STEP = 16  # rows by which tiles differ
# Most rows of a tile, of measured ones the fastest: a group is one product as long as it has no more. Cores
# hand each other a tile's rows, experts and results, the slower the less cache they share.
MOST = 1536
SHARE = 256  # a group's rows in exported programs, whose number no one knows: a call may have few


def heights(M: int, groups: int) -> tuple[int, ...]:
    """Choose how many rows tiles may have: all but a group's last one have as many as the last number says.

    Most tiles are a group's only one where groups are small: steps are narrow around a group's share of the M
    rows, which few groups are far from.
    """
    share = M / groups if known(M) else SHARE
    tile = min(MOST, round_up(int(1.5 * share) + 1, STEP))
    near = (0.125, 0.25, 0.4375, 0.625, 0.8125, 0.9375, 1, 1.0625, 1.1875)
    parts = near if share < tile else (0.125, 0.25, 0.375, 0.5, 0.75)
    some = (min(tile, round_up(int(part * min(share, tile)) + 1, STEP)) for part in parts)
    return tuple(sorted({*some, tile}))


def by_rows(
    x: Array,
    matrix: Callable[[Array], Array],
    sizes: Array,
    N: int,
    *,
    transposed: bool = False,
    read: Array | None = None,
    add: Array | None = None,
    out_rows: Any = None,
) -> Array:
    """Multiply row i by `matrix(e)` of its own group e; rows past all groups give zeros.

    Args:
      x: [M, K], or [T, K] with `read`.
      matrix: e -> [K, N], for groups that have rows.
      sizes: int32 [E].
      N: columns of the result.
      transposed: the matrices are [N, K], multiplied by as they lie: XLA on CPU would write W^T down, twice.
      read: row i is x[read[i]], int32 [M]; zeros where that is past the last.
      add: row i is added to the result's row add[i], int32 [M], if there is one.
      out_rows: rows of the result with `add`.

    Returns:
      [M, N], or [out_rows, N] with `add`.
    """
    count = x.shape[0] if read is None else read.shape[0]
    options = heights(count, sizes.shape[0])
    x, read, add = _at_least(options[-1], x, read, add, out_rows)
    M = x.shape[0] if read is None else read.shape[0]
    rows = M if add is None else out_rows

    def group(e: Array, y: Array) -> Array:
        w = matrix(e)

        def whole(at: Array, count: int, y: Array) -> Array:
            part = _product(_rows(x, read, at, count), w, transposed)
            if add is None:
                return lax.dynamic_update_slice_in_dim(y, part, at, 0)
            return y.at[_part(add, at, count)].add(part, mode="drop")

        def last(at: Array, count: int, mine: Array, y: Array) -> Array:
            part = _product(_rows(x, read, at, count), w, transposed)
            if add is None:
                part = jnp.where(mine[:, None], part, _part(y, at, count))
                return lax.dynamic_update_slice_in_dim(y, part, at, 0)
            return y.at[jnp.where(mine, _part(add, at, count), rows)].add(part, mode="drop")

        return _each_tile(options, sizes, e, M, y, whole, last)

    y = _each_group(sizes, jnp.zeros((rows, N), accumulator(x.dtype)), group, (x, sizes, read, add))
    return trim(y, (count, N)) if add is None else y


def by_groups(
    x: Array, y: Array, sizes: Array, *, read_x: Array | None = None, read_y: Array | None = None
) -> Array:
    """Sum the products x_i y_i^T over the rows of each group: [E, K, N]; zeros of empty groups.

    Row i is x[read_x[i]] and y[read_y[i]] where these are given.
    """
    M = x.shape[0] if read_x is None else read_x.shape[0]
    options = heights(M, sizes.shape[0])
    x, read_x, _ = _at_least(options[-1], x, read_x)
    y, read_y, _ = _at_least(options[-1], y, read_y)
    M, dtype = x.shape[0] if read_x is None else read_x.shape[0], accumulator(x.dtype)
    shape = sizes.shape[0], x.shape[1], y.shape[1]

    def group(e: Array, sums: Array) -> Array:
        def whole(at: Array, count: int, sums: Array) -> Array:
            more = _sum_of_products(_rows(x, read_x, at, count), _rows(y, read_y, at, count))
            return put(sums, lax.dynamic_index_in_dim(sums, e, keepdims=False) + more)

        def last(at: Array, count: int, mine: Array, sums: Array) -> Array:
            # Both: what isn't finite in another group's row stays there.
            left, right = _rows(x, read_x, at, count), _rows(y, read_y, at, count)
            left, right = (jnp.where(mine[:, None], a, 0) for a in (left, right))
            return put(sums, _sum_of_products(left, right))  # the first of the group's: nothing to add to

        def put(sums: Array, total: Array) -> Array:
            return lax.dynamic_update_index_in_dim(sums, total, e, 0)

        return _each_tile(options, sizes, e, M, sums, whole, last)

    return _each_group(sizes, jnp.zeros(shape, dtype), group, (x, y, sizes, read_x, read_y))


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
    whole: Callable[[Array, int, Array], Array],
    last: Callable[[Array, int, Array, Array], Array],
) -> Array:
    """Visit the rows of group e: the last tile, which may have other groups' rows too, then those before it.

    Args:
      heights: rows of a tile, behind those that the last tile may have.
      sizes: int32 [E].
      e: the group.
      M: rows of all groups.
      state: what the visits change.
      whole: (first row, rows, state) -> state, for a tile of this group's rows alone.
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
        state = lax.fori_loop(0, tiles, lambda i, state: whole(start + i * tile, tile, state), state)
    return state


def _when(condition: Array, change: Callable[[Array | int, Array], Array], state: Array) -> Array:
    """`change(0, state)` if the condition holds, by a loop: XLA copies what a branch returns.

    The zero is the loop's counter: what does not depend on it XLA computes before the loop, even if none of
    its steps is taken.
    """
    return lax.fori_loop(0, condition.astype(jnp.int32), change, state)


def _at_least(
    tile: int, x: Array, read: Array | None, add: Array | None = None, out_rows: Any = None
) -> tuple[Array, Array | None, Array | None]:
    """Put a tile of rows that are none behind rows of unknown number, as in exported programs."""
    rows = x if read is None else read
    if known(rows.shape[0]):
        return x, read, add

    def behind(a: Array, value: Any) -> Array:
        return jnp.concatenate([a, jnp.broadcast_to(jnp.asarray(value, a.dtype), (tile, *a.shape[1:]))])

    add = None if add is None else behind(add, out_rows)
    return (behind(x, 0), None, add) if read is None else (x, behind(read, x.shape[0]), add)


def _rows(x: Array, read: Array | None, at: Array, count: int) -> Array:
    if read is None:
        return _part(x, at, count)
    return x.at[_part(read, at, count)].get(mode="fill", fill_value=0)


def _part(x: Array, at: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, count, 0)


def _sum_of_products(x: Array, y: Array) -> Array:
    """The sum of x_i y_i^T over rows. x^T is written down: on CPU XLA sums over rows slower."""
    return _product(lax.optimization_barrier(x.T), y)


def _product(x: Array, y: Array, transposed: bool = False) -> Array:
    """The product x y, or x y^T as y lies."""
    operand = operand_dtype(x.dtype)
    x, y = x.astype(operand), y.astype(operand)
    axes = ((1,), (1 if transposed else 0,)), ((), ())
    return lax.dot_general(x, y, axes, precision="highest", preferred_element_type=accumulator(operand))
