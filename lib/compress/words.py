"""QMoE's dictionary: 2^16 runs of ternary pairs, those that are most probable in mostly zero weights.

Source: Frantar & Alistarh 2023, QMoE (arXiv 2310.16795), section 4.2.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

COUNT = 2**16  # a codeword has 16 bits
LONGEST = 14  # pairs of a run: two words of 7 pairs, 4 bits each
ZEROS = 0.885  # the share of zeros that the dictionary is made for
PAIRS = 9  # the values of a pair of trits; pair 3 a + b holds trit a, then trit b


class Dictionary(NamedTuple):
    """The runs of all codewords, and the tree of them that an encoder walks.

    Attributes:
      words: uint32 [2^16, 2], pairs 0 to 6 and 7 to 13 of each run: pair i has bits 4 i and up, its first
        trit the lower two. A trit is 0, 1 (above zero) or 2 (below). The top 4 bits of the first are the
        run's number of pairs.
      longer: int32 [2^16 + 1, 9], the codeword of a run with one pair more, or -1; its last row is that of
        the empty run.
    """

    words: np.ndarray
    longer: np.ndarray


@functools.cache
def dictionary() -> Dictionary:
    """Build the dictionary: the 2^16 most probable runs of up to 14 pairs, the likeliest first.

    A run of n pairs with m trits other than zero has the probability p0^(2 n - m) ((1 - p0) / 2)^m. Of runs
    that are equally probable those that come first in order are taken. Each run's beginnings are likelier
    than itself, so they are all in it: a greedy encoder may stop anywhere.

    Example:
        >>> from frugax.compress.words import dictionary
        >>> dictionary().words.shape, dictionary().words[0].tolist()  # the likeliest: one pair, of zeros
        ((65536, 2), [268435456, 0])
    """
    classes = sorted(
        (-_log_probability(n, m), n, m, math.comb(2 * n, m) * 2**m)
        for n in range(1, LONGEST + 1)
        for m in range(2 * n + 1)
    )
    room, take = COUNT, {}  # how many runs of each (n, m)
    for _, n, m, count in classes:
        take[n, m] = min(count, room)
        room -= take[n, m]
        if room == 0:
            break

    # A run's key has its pairs as digits of base 9 after a leading 1, so that key // 9 is one pair shorter.
    # Runs of n pairs grow from the kept ones of n - 1.
    marks = np.array([(p // 3 > 0) + (p % 3 > 0) for p in range(PAIRS)])
    keys, counts = np.ones(1, np.int64), np.zeros(1, np.int64)
    found = []
    for n in range(1, LONGEST + 1):
        keys = (keys[:, None] * PAIRS + np.arange(PAIRS)).reshape(-1)
        counts = (counts[:, None] + marks).reshape(-1)
        likely = np.zeros(len(keys), bool)
        for m in range(2 * n + 1):
            of_class = np.flatnonzero(counts == m)[: take.get((n, m), 0)]  # keys are in order
            likely[of_class] = True
            found.append((_log_probability(n, m), n, keys[of_class]))
        keys, counts = keys[likely], counts[likely]
    found.sort(key=lambda part: -part[0])
    lengths = np.concatenate([np.full(len(part), n) for _, n, part in found])
    return _tables(np.concatenate([part for *_, part in found]), lengths)


def _log_probability(n: int, m: int) -> float:
    return (2 * n - m) * math.log(ZEROS) + m * math.log((1 - ZEROS) / 2)


def _tables(keys: np.ndarray, lengths: np.ndarray) -> Dictionary:
    order = np.argsort(keys)
    parents, last = keys // PAIRS, keys % PAIRS
    at = np.searchsorted(keys[order], parents)
    codes = np.where(parents == 1, COUNT, order[np.minimum(at, COUNT - 1)])
    longer = np.full((COUNT + 1, PAIRS), -1, np.int32)
    longer[codes, last] = np.arange(COUNT)

    words = np.zeros((COUNT, 2), np.uint32)
    rest = keys.copy()
    for back in range(LONGEST):  # from the last pair of each run to its first
        place, pair = lengths - 1 - back, rest % PAIRS
        here = np.flatnonzero(place >= 0)
        bits = (pair // 3 | pair % 3 << 2).astype(np.uint32)
        words[here, place[here] // 7] |= bits[here] << (4 * (place[here] % 7)).astype(np.uint32)
        rest //= PAIRS
    words[:, 0] |= lengths.astype(np.uint32) << np.uint32(28)
    return Dictionary(words, longer)


def encode(trits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode rows of trits greedily: each codeword is the longest run that fits.

    Args:
      trits: [R, K] of 0, 1 and 2. An odd row is filled up with a zero.

    Returns:
      The codewords of all rows, uint16 [n], and where each row begins in them, int32 [R + 1].

    Example:
        >>> import numpy as np
        >>> from frugax.compress.words import encode
        >>> codes, offsets = encode(np.zeros((2, 56), np.int8))
        >>> codes.shape, offsets.tolist()  # two runs of 28 zeros each
        ((4,), [0, 2, 4])
    """
    longer = dictionary().longer
    pairs = np.pad(trits, [(0, 0), (0, trits.shape[1] % 2)]).reshape(len(trits), -1, 2).astype(np.int64)
    pairs = np.ascontiguousarray((3 * pairs[..., 0] + pairs[..., 1]).T)  # [P, R]
    done = np.full((len(pairs) + 1, len(trits)), -1, np.int32)  # the codeword that ends before each pair
    node = np.full(len(trits), COUNT)
    for place, pair in enumerate(pairs):
        following = longer[node, pair]
        ends = following < 0
        done[place, ends] = node[ends]
        node = np.where(ends, longer[COUNT, pair], following)
    done[-1] = node
    done = done.T
    offsets = np.append(0, np.cumsum((done >= 0).sum(1)))
    return done[done >= 0].astype(np.uint16), offsets.astype(np.int32)
