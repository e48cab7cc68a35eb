"""The visits of a kernel: which rows it multiplies, by which group's matrix, one after the other.

A tile of rows begins where its group does, up to the last whole stripe of 16: copies between memories start
and end there. So a tile has rows of one group, but for its first and last stripe.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

STRIPE = 16  # rows of a bfloat16 register


class Visits(NamedTuple):
    """The work of each visit, int32 [V], of which the first `total` are real.

    Attributes:
      group: of its rows; the last one that has rows, where they belong to none.
      block: the first row fetched, of as many as a tile has.
      base: the first row multiplied, as many as its kind says.
      start: the first row of its first stripe. A group's first visit is the one with fewer rows than a tile:
        while the last is worked on, the next group's matrix is fetched, which takes long.
      low, high: its own rows are low <= row < high.
      kind: the place in `heights` of the number of rows multiplied; their number where there are none.
      total: int32 [1], how many there are.
    """

    group: Array
    block: Array
    base: Array
    start: Array
    low: Array
    high: Array
    kind: Array
    total: Array

    def scalars(self) -> dict[str, Array]:
        """The arrays by name, for a kernel's scalar memory."""
        return {name: x for name, x in self._asdict().items() if name != "total"}


def visits(group_sizes: Array, rows: int, heights: tuple[int, ...], *, every_group: bool = False) -> Visits:
    """List the visits of groups in order, and of the rows past them.

    Args:
      group_sizes: int32 [E], of sum <= rows. Wrong ones lead no visit out: kernels test no addresses.
      rows: all there are, a multiple of STRIPE.
      heights: the numbers of rows that the kernel can multiply, multiples of STRIPE in order. The last is a
        tile's, at most `rows`.
      every_group: groups without rows have a visit too; rows past all groups have none.
    """
    E, tile = group_sizes.shape[0], heights[-1]
    sizes = jnp.clip(group_sizes.astype(jnp.int32), 0, rows)
    ends = jnp.clip(jnp.cumsum(sizes, dtype=jnp.int32), 0, rows)
    if not every_group:
        ends = jnp.append(ends, jnp.int32(rows))
    first = jnp.pad(ends[:-1], (1, 0))
    sizes = ends - first
    start = first & -STRIPE
    covered = jnp.where(sizes > 0, ((ends + STRIPE - 1) & -STRIPE) - start, 0)
    tiles = (covered + tile - 1) // tile
    part = covered - jnp.maximum(tiles - 1, 0) * tile  # rows of the first visit
    tiles = jnp.maximum(tiles, 1) if every_group else tiles
    until = jnp.cumsum(tiles, dtype=jnp.int32)

    most = (rows + 2 * STRIPE * len(sizes)) // tile + len(sizes)
    number = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(number[:, None] >= until[None], 1, dtype=jnp.int32), len(sizes) - 1)
    place = number - (until - tiles)[group]
    at = start[group] + jnp.where(place > 0, part[group] + (place - 1) * tile, 0)
    at = jnp.minimum(at, rows - STRIPE)  # visits past the total may be anywhere
    height = jnp.where(place > 0, tile, part[group])
    kind = jnp.searchsorted(jnp.asarray(heights, jnp.int32), height).astype(jnp.int32)
    none = (group == E) | (height == 0)
    latest = jnp.max(jnp.where(sizes[:E] > 0, jnp.arange(E, dtype=jnp.int32), 0))
    block = jnp.minimum(at, rows - tile)
    multiplied = jnp.where(none, tile, jnp.asarray(heights, jnp.int32)[jnp.minimum(kind, len(heights) - 1)])
    return Visits(
        group=group if every_group else jnp.minimum(group, latest),
        block=block,
        base=jnp.minimum(at, block + tile - multiplied),
        start=at,
        low=jnp.maximum(first[group], at),
        high=jnp.minimum(ends[group], at + height),
        kind=jnp.where(none, len(heights), kind),
        total=until[-1:],
    )
