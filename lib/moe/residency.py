"""Experts in fast memory, step by step: caches, prefetching, and batches that share experts.

All of it is NumPy over traces of experts, such as `Routing.indices` of tokens as they came.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

Policy = Literal["lru", "belady"]


def cache_hits(trace: Sequence[Any] | np.ndarray, size: int, *, policy: Policy = "lru") -> np.ndarray:
    """Tell which requests of a trace find their expert in a cache.

    Args:
      trace: the expert of each request [N], in order.
      size: how many experts the cache holds.
      policy: what is put out for a new one: "lru", the expert that was used least recently, or "belady", the
        one that is used again last or never. It looks ahead, as one may where choices are known before the
        model runs, and no other policy has more hits.

    Returns:
      bool [N]; its mean is the rate of hits.

    Raises:
      ValueError: size is below 1, the trace is not [N], or there is no such policy.

    Source: Cai et al. 2024, Read-ME (arXiv 2410.19123); Belady 1966.

    Example:
        >>> import frugax
        >>> trace = [0, 1, 2, 0, 1, 2]
        >>> [int(frugax.moe.cache_hits(trace, 2, policy=policy).sum()) for policy in ("lru", "belady")]
        [0, 2]
    """
    experts = np.asarray(trace)
    if experts.ndim != 1 or not (experts.size == 0 or np.issubdtype(experts.dtype, np.integer)):
        raise ValueError(f"trace: got {experts.dtype}{list(experts.shape)}; expected integers [requests]")
    if size < 1:
        raise ValueError(f"size: got {size}; expected at least 1 expert")
    if policy not in get_args(Policy):
        raise ValueError(f"policy: got {policy!r}; expected one of {', '.join(get_args(Policy))}")
    requests = experts.tolist()
    following = [0] * len(requests)
    later: dict[int, int] = {}
    for at in reversed(range(len(requests))):
        following[at] = later.get(requests[at], len(requests))
        later[requests[at]] = at
    hits = np.zeros(len(requests), bool)
    cache: dict[int, int] = {}  # expert -> how long it is worth keeping: its last use, or minus its next one
    for at, expert in enumerate(requests):
        hits[at] = expert in cache
        if not hits[at] and len(cache) == size:
            del cache[min(cache, key=cache.__getitem__)]
        cache[expert] = at if policy == "lru" else -following[at]
    return hits


def expert_batches(requests: Iterable[Any], size: int) -> list[list[int]]:
    """Batch waiting requests so that those of a batch need few experts.

    Each batch begins with the request that has waited longest, so none waits forever. Then comes, time after
    time, the one that adds the fewest experts to the batch's; of equal ones, the first.

    Args:
      requests: the experts that each request needs, integers, known before it runs, in order of arrival.
      size: how many requests make a batch; the last one may have fewer.

    Returns:
      The requests of each batch, by their places.

    Raises:
      ValueError: size is below 1.

    Source: Cai et al. 2024, Read-ME (arXiv 2410.19123), expert-aware batching.

    Example:
        >>> import frugax
        >>> frugax.moe.expert_batches([{0}, {1}, {0}, {1}], 2)
        [[0, 2], [1, 3]]
    """
    if size < 1:
        raise ValueError(f"size: got {size}; expected at least 1 request")
    waiting = {at: frozenset(map(int, needed)) for at, needed in enumerate(requests)}
    batches = []
    while waiting:
        batch: list[int] = []
        experts: set[int] = set()
        while waiting and len(batch) < size:
            at = min(waiting, key=lambda i: (len(waiting[i] - experts) if batch else 0, i))
            experts |= waiting.pop(at)
            batch.append(at)
        batches.append(batch)
    return batches


class Prefetched(NamedTuple):
    """The result of `prefetch`.

    Attributes:
      hit_rate: the share of experts that were there when their block began, from the second block on.
      peak: the most experts that were in fast memory at the same time, of all blocks.
      fetched: how many were copied there.

    Example:
        >>> import frugax
        >>> frugax.moe.prefetch([{0}, {1}], [{0}, {1}]).peak
        2
    """

    hit_rate: float
    peak: int
    fetched: int


def prefetch(used: Iterable[Any], announced: Iterable[Any]) -> Prefetched:
    """Follow one pass through the blocks of a model, each fetching the experts of the next one.

    While block i runs, the experts that it announces for block i + 1 are copied to fast memory. When block
    i + 1 begins, block i's are freed, and what was not announced is fetched at once. The first block's
    experts come from a gate of its own. Every block has experts of its own: the same number in two blocks is
    two experts.

    Args:
      used: the experts that each block uses.
      announced: those that are announced for each block, by the block before it; the first entry is not read.

    Returns:
      A `Prefetched`; times the bytes of an expert, its peak is the memory that experts take.

    Raises:
      ValueError: the two have different numbers of blocks, or there is none.

    Source: Hwang et al. 2023, Pre-gated MoE (arXiv 2308.12066).

    Example:
        >>> import frugax
        >>> experts = [{0, 1}, {2}, {0, 3}]
        >>> frugax.moe.prefetch(experts, experts)  # of a pre-gate, whose choice is what the block uses
        Prefetched(hit_rate=1.0, peak=3, fetched=5)
    """
    needs, ahead = ([{int(e) for e in block} for block in blocks] for blocks in (used, announced))
    if len(needs) != len(ahead) or not needs:
        raise ValueError(f"announced: got {len(ahead)} blocks; expected {len(needs)}, and one at least")
    ahead[0] = needs[0]
    hits = peak = fetched = 0
    for i, now in enumerate(needs):
        here = ahead[i] | now  # what was announced in vain stays as long as the block runs
        coming = ahead[i + 1] if i + 1 < len(needs) else set()
        peak = max(peak, len(here) + len(coming))
        fetched += len(here)
        hits += len(now & ahead[i]) if i else 0
    asked = sum(map(len, needs[1:]))
    return Prefetched(hits / asked if asked else 1.0, peak, fetched)
