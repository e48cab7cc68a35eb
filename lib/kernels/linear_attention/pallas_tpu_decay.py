"""Decays inside a chunk of a TPU kernel: as weights between pairs of tokens, none of them above 1."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from ..common.chips import LANES, SUBLANES
from ..common.tpu import dot, iota

# A log decay of RESTART is a new document. exp(-104) is already zero in float32, so clamping every other
# log decay at FLOOR changes no result, and keeps sums of a chunk of them finite.
RESTART, FLOOR = -128.0, -127.0


# One decay a head: the weight of a pair of tokens is one number, exp of a difference of running sums.


@dataclass(frozen=True)
class HeadDecay:
    """One head's decay in a chunk, C tokens long."""

    pairs: Array  # [C, C] weight of token j as token i reads it; zero for j > i (with a bonus, for j = i too)
    read: Array | float  # [C, 128] weight of the incoming state as token i reads it, the same in every lane
    write: Array | float  # [C, 1] weight of token j in the outgoing state
    write_row: Array | float  # [1, C], the same
    last: Array | float  # [1, 1] weight of the incoming state in the outgoing one


def prepare_decays(rows: Array, *, bonus: bool, exact: bool) -> tuple[Array, Array]:
    """The operands of `head_decay`, from a chunk's log decays [8, C]: rows [24, C] and columns [C, 24].

    Rows: the tokens' weights in the outgoing state, and the running sums, in two parts if `exact` (float32
    needs it, for mild gates beside strong ones), else whole, and 16 rows. Columns: the same weights, and the
    sums that a token reads with.
    """
    parts, sums = running_sums(rows)
    reads = sums
    if bonus:  # a token reads before its own decay, but after its own restart
        own = rows > (RESTART + FLOOR) / 2
        reads = [total - jnp.where(own, part, 0.0) for total, part in zip(sums, parts, strict=True)]
    ends = [x[:, -1:] for x in sums]
    writes = jnp.exp((ends[0] - sums[0]) + (ends[1] - sums[1]))
    if not exact:
        sums, reads = [sums[0] + sums[1]], [reads[0] + reads[1]]
    return jnp.concatenate([writes, *sums], axis=0), jnp.concatenate([writes, *reads], axis=0).T


def head_decay(prepared: tuple[Array, Array] | None, n: int, chunk: int, *, bonus: bool) -> HeadDecay:
    """The decay of head n, from `prepare_decays`; None for no decay."""
    C = chunk
    i, j = iota((C, C), 0), iota((C, C), 1)
    seen = i > j if bonus else i >= j
    if prepared is None:
        return HeadDecay(jnp.where(seen, 1.0, 0.0), 1.0, 1.0, 1.0, 1.0)
    rows, columns = prepared
    totals = [rows[p + n : p + n + 1] for p in range(SUBLANES, rows.shape[0], SUBLANES)]
    reads = [columns[:, p + n : p + n + 1] for p in range(SUBLANES, rows.shape[0], SUBLANES)]
    wide = [jnp.broadcast_to(x, (C, LANES)) for x in reads]
    exponent = sum(x[:, :C] - y for x, y in zip(wide, totals, strict=True))
    pairs = jnp.exp(jnp.where(seen, exponent, -jnp.inf))
    last = jnp.exp(sum(x[:, C - 1 :] for x in totals))
    return HeadDecay(pairs, jnp.exp(sum(wide)), columns[:, n : n + 1], rows[n : n + 1], last)


def running_sums(rows: Array) -> tuple[tuple[Array, Array], list[Array]]:
    """Rows [8, C] as a coarse and a fine part, and each part's sums up to every column, the column included.

    Multiples of 1/2 add up exactly, so what strong gates amount to takes no digits from sums of mild ones.
    """
    C = rows.shape[1]
    coarse = jnp.round(rows * 2) / 2
    parts = coarse, rows - coarse
    sums = masked_sums(jnp.concatenate(parts, axis=0), iota((C, C), 0) <= iota((C, C), 1))
    return parts, [sums[:SUBLANES], sums[SUBLANES:]]


def masked_sums(rows: Array, mask: Array) -> Array:
    """[n, C]: for each column t, the sum of a row's entries s where mask[s, t], as good as in float32.

    Three bfloat16 pieces hold a float32 number whole, and ones are exact: one pass of the matrix unit does.
    """
    pieces, left = [], rows
    for _ in range(3):
        pieces.append(left.astype(jnp.bfloat16).astype(jnp.float32))
        left = left - pieces[-1]
    ones = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    sums = dot(jnp.concatenate(pieces, axis=0).astype(jnp.bfloat16), ones, "nn")
    n = rows.shape[0]
    return sums[:n] + (sums[n : 2 * n] + sums[2 * n :])


def across(weight: Array | float, width: int) -> Array | float:
    """A weight the same in every lane, [C, 128], made as wide as what it multiplies."""
    if isinstance(weight, float):
        return weight
    return jnp.concatenate([weight] * (width // LANES), axis=1)


# One decay a channel: the weight differs by channel, so it must enter q and k before their product. Halve
# the chunk, and its halves, down to single tokens: each pair (i, j) is parted at one level, by a boundary
# between j and i, and its weight is (product of decays from the boundary to i) * (product from j to the
# boundary). A product of decays is at most 1, and it loses nothing to cancellation, however strong the
# decays.


@dataclass(frozen=True)
class Level:
    """The pairs of tokens that lie in the two halves of the same block of 2 * half tokens."""

    half: int
    read: Array  # [C, K] for tokens of right halves: product of decays from the half's start to the token
    write: Array  # [C, K] for tokens of left halves: product of the decays after the token to the half's end


def swap_halves(x: Array, half: int) -> Array:
    """Row i gets row i ^ half; half is below SUBLANES."""
    C, K = x.shape
    x = x.reshape(C // SUBLANES, SUBLANES, K)
    if 2 * half == SUBLANES:
        return pltpu.roll(x, half, 1).reshape(C, K)
    right = (iota(x.shape, 1) & half) != 0
    swapped = jnp.where(right, pltpu.roll(x, half, 1), pltpu.roll(x, SUBLANES - half, 1))
    return swapped.reshape(C, K)


def split(x: Array, half: int) -> tuple[list[Array], list[Array]]:
    """Left and right halves of each block of 2 * half rows."""
    blocks = [x[n : n + half] for n in range(0, x.shape[0], half)]
    return blocks[::2], blocks[1::2]


def join(lefts: list[Array], rights: list[Array]) -> Array:
    """The rows that `split` took apart."""
    return jnp.concatenate([x for pair in zip(lefts, rights, strict=True) for x in pair], axis=0)


def is_right(shape: tuple[int, int], half: int) -> Array:
    groups, K = shape[0] // SUBLANES, shape[1]
    # Eight rows, repeated: one register, one comparison, whatever the shape.
    row = jnp.broadcast_to(iota((1, SUBLANES, K), 1), (groups, SUBLANES, K))
    return (row.reshape(shape) & half) != 0


def levels(decay: Array, keep: Array | None, *, bonus: bool) -> tuple[list[Level], Level, Array]:
    """The levels of a chunk, the whole chunk as one more (read since its start, write until its end), and the
    product of all its decays [1, K].

    Args:
      decay: [C, K] float32 in [0, 1], zero where a document starts.
      keep: [C, 1], zero where a document starts, else one; None if none does.
      bonus: whether a token reads before its own decay.
    """
    C, K = decay.shape
    read = decay
    if bonus:
        read = jnp.ones_like(decay) if keep is None else jnp.broadcast_to(keep, decay.shape)
    write, total = jnp.ones_like(decay), decay
    found = []
    half = 1
    while half < min(C, SUBLANES):
        found.append(Level(half, read, write))
        right, other = is_right((C, K), half), swap_halves(total, half)
        read = jnp.where(right, read * other, read)
        write = jnp.where(right, write, other if half == 1 else write * other)
        if bonus or 4 * half <= SUBLANES:
            total = total * other
        half *= 2
    if not bonus:  # the last token of eight reads with the decays of all
        total = read
    totals = [total[n : n + 1] for n in range(SUBLANES - 1, C, SUBLANES)]
    while half < C:
        found.append(Level(half, read, write))
        lefts, rights = split(read, half)
        read = join(lefts, [x * t for x, t in zip(rights, totals[::2], strict=True)])
        lefts, rights = split(write, half)
        write = join([x * t for x, t in zip(lefts, totals[1::2], strict=True)], rights)
        totals = [a * b for a, b in zip(totals[::2], totals[1::2], strict=True)]
        half *= 2
    return found, Level(C, read, write), totals[0]


def ranks(C: int, *, transposed: bool = False) -> Array:
    """[C, C]: row ^ column where the row is the later token (if transposed, the earlier one), else 0.

    A pair belongs to the level of the highest bit: the last one whose half is no more than its rank.
    """
    row, column = iota((C, C), 0), iota((C, C), 1)
    return jnp.where(row < column if transposed else row > column, row ^ column, 0)


def log_decay_gradient(found: list[Level], grads: list[tuple[Array, Array]], whole, *, bonus: bool) -> Array:
    """d log_decay [C, K], back through the products.

    Args:
      found: the levels, as `levels` gave them.
      grads: for each level, d log of its (read, write), [C, K]: of right halves, of left halves.
      whole: the same of the whole chunk, and d log of the product of all decays [1, K].
    """
    d_read, d_write, d_total = whole
    C, K = d_read.shape
    totals = [d_total]
    for level, (dr, dw) in zip(reversed(found), reversed(grads), strict=True):
        half = level.half
        if half >= SUBLANES:
            lr, rr = split(d_read, half)
            lw, rw = split(d_write, half)
            halves = []
            for t, r, w in zip(totals, rr, lw, strict=True):
                halves += [t + jnp.sum(r, axis=0, keepdims=True), t + jnp.sum(w, axis=0, keepdims=True)]
            totals = halves
            d_read = join(lr, [x + y for x, y in zip(rr, split(dr, half)[1], strict=True)])
            d_write = join([x + y for x, y in zip(lw, split(dw, half)[0], strict=True)], rw)
        else:
            if isinstance(totals, list):
                totals = jnp.concatenate([jnp.broadcast_to(t, (2 * half, K)) for t in totals], axis=0)
            right = is_right((C, K), half)
            crossing = jnp.where(right, d_read, d_write)  # what depends on the other half's total
            step = 1
            while step < half:
                crossing = crossing + swap_halves(crossing, step)
                step *= 2
            totals = totals + swap_halves(crossing, half)
            d_read = d_read + jnp.where(right, dr, 0.0)
            d_write = d_write + jnp.where(right, 0.0, dw)
    return totals if bonus else totals + d_read
