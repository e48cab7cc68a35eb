"""Simulations of expert memory against what they are defined by: searches over all evictions, and sets."""

import functools
import itertools

import jax
import numpy as np
import pytest

from frugax import moe

RNG = np.random.default_rng(0)


def least_misses(trace: tuple[int, ...], size: int) -> int:
    """By trying every eviction."""

    @functools.cache
    def go(at: int, cache: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        if trace[at] in cache:
            return go(at + 1, cache)
        if len(cache) < size:
            return 1 + go(at + 1, cache | {trace[at]})
        return 1 + min(go(at + 1, cache - {out} | {trace[at]}) for out in cache)

    return go(0, frozenset())


def test_belady_is_the_best_of_all_evictions_and_lru_is_recency():
    for size in (1, 2, 3):
        for _ in range(10):
            trace = RNG.integers(0, 5, 14)
            belady = moe.cache_hits(trace, size, policy="belady")
            assert (~belady).sum() == least_misses(tuple(trace.tolist()), size)
            lru = moe.cache_hits(trace, size)
            for at, hit in enumerate(lru):
                before = np.flatnonzero(trace[:at] == trace[at])
                between = len(set(trace[before[-1] : at].tolist())) if len(before) else np.inf
                assert hit == (between <= size)
            assert belady.sum() >= lru.sum()
    assert moe.cache_hits(RNG.integers(0, 5, 50), 5).sum() == 45  # everything fits: a miss for each expert


def tokens_of_domains(tokens: int, experts: int, k: int) -> np.ndarray:
    """The choices of a router for tokens of two documents that come in turns."""
    prefer = RNG.standard_normal((2, experts)) * 2
    logits = prefer[np.arange(tokens) % 2] + RNG.standard_normal((tokens, experts))
    return np.asarray(jax.jit(lambda x: moe.softmax_top_k(x, k).indices)(logits.astype(np.float32)))


def test_batches_by_expert_need_fewer_experts():
    """Each request once, the oldest in the next batch, and fewer experts than in the order of arrival."""
    choices, size = tokens_of_domains(61, 16, 2), 8
    batches = moe.expert_batches(choices, size)
    assert sorted(i for batch in batches for i in batch) == list(range(61))
    assert [len(b) for b in batches] == [8] * 7 + [5]
    waiting = set(range(61))
    for batch in batches:
        assert min(waiting) in batch
        waiting -= set(batch)

    def experts(batch):
        return len(np.unique(choices[batch]))

    in_order = [list(range(i, min(i + size, 61))) for i in range(0, 61, size)]
    assert np.mean([*map(experts, batches)]) < 0.8 * np.mean([*map(experts, in_order)])
    # The batches' experts, one after the other, ask less of a cache too; looking ahead, still less.
    ordered, batched = ([e for b in bs for e in np.unique(choices[b])] for bs in (in_order, batches))
    misses = [(~moe.cache_hits(t, 6, policy=p)).sum() for t in (ordered, batched) for p in ("lru", "belady")]
    assert misses[3] <= misses[2] < misses[0]
    assert misses[1] <= misses[0]


def test_prefetching_what_is_announced():
    """A pre-gate's announcements are all used: two blocks' experts are resident, and none is late."""
    blocks = [set(np.unique(block).tolist()) for block in RNG.integers(0, 16, (6, 3, 2))]
    found = moe.prefetch(blocks, blocks)
    assert found.hit_rate == 1
    assert found.peak == max(len(a) + len(b) for a, b in itertools.pairwise(blocks)) < 6 * 16
    assert found.fetched == sum(map(len, blocks))
    # A guess may be wrong: what it brought in vain is resident as well, and what it missed comes late.
    late = moe.prefetch([{0}, {1, 2}, {3}], [{9}, {2, 5}, set()])
    assert late.hit_rate == pytest.approx(1 / 3)
    assert (late.peak, late.fetched) == (3, 1 + 3 + 1)
    assert moe.prefetch([{4}], [{4}]) == (1.0, 1, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: moe.cache_hits([0, 1], 0), "size: got 0"),
        (lambda: moe.cache_hits([[0, 1]], 1), r"trace: got int64\[1, 2\]"),
        (lambda: moe.cache_hits([0.5], 1), r"trace: got float64\[1\]"),
        (lambda: moe.cache_hits([0], 1, policy="fifo"), "policy: got 'fifo'; expected one of lru, belady"),
        (lambda: moe.expert_batches([{0}], 0), "size: got 0"),
        (lambda: moe.prefetch([{0}], []), "announced: got 0 blocks; expected 1"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
