"""Core attention as tasks that any device may do: cut, balanced over servers, and put together exactly."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..kernels.common.arguments import accumulator

_LOWEST = -1e30  # in place of minus infinity, whose differences are no numbers


class CoreTask(NamedTuple):
    """Queries of a document with some of its keys, causal; places are counted within the document.

    Attributes:
      document: its number.
      queries: first and one past the last.
      keys: likewise.
      home: the device that has these queries.
      server: the device that does the task.
    """

    document: int
    queries: tuple[int, int]
    keys: tuple[int, int]
    home: int
    server: int

    @property
    def work(self) -> int:
        """Pairs of a query and a key that it sees."""
        (a, b), (c, d) = self.queries, self.keys
        return _pairs(b, d) - _pairs(a, d) - _pairs(b, c) + _pairs(a, c)


class Balance(NamedTuple):
    """Work of each server, the largest over the mean, and bytes sent between devices."""

    work: tuple[int, ...]
    imbalance: float
    bytes: int


def balance_core_attention(
    lengths: Sequence[int],
    homes: Sequence[int],
    *,
    servers: int,
    query_bytes: int,
    key_bytes: int,
    tolerance: float = 0.05,
    block: int = 1,
) -> list[CoreTask]:
    """Share core attention out evenly over all devices, wherever its tokens are, for few bytes.

    Softmax attention without its projections has no params, so any device can do it for some queries and the
    keys before them. Servers with less than the mean take work from those with more, the most needy first. Of
    the first and the last queries of each document that part is taken which gives most work for its bytes:
    queries, outputs and the prefix of keys and values.

    Args:
      lengths: tokens of each document.
      homes: the device that has each document.
      servers: devices in all; each is a home too.
      query_bytes: of a token's queries, and of its outputs.
      key_bytes: of a token's keys and values.
      tolerance: a server may lack so much of the mean.
      block: tasks are cut at multiples of so many queries.

    Returns:
      Tasks that together are all pairs of each document, by document and place.

    Raises:
      ValueError: a home is no server, or numbers of documents differ.

    Source: Efficient Long-context Language Model Training by Core Attention Disaggregation, 2025
    (arXiv 2510.18121), and its public planner.

    Example:
        >>> import frugax
        >>> tasks = frugax.planner.balance_core_attention(
        ...     [64, 16, 16], [0, 1, 1], servers=2, query_bytes=2, key_bytes=1, tolerance=0.02)
        >>> found = frugax.planner.core_balance(tasks, servers=2, query_bytes=2, key_bytes=1)
        >>> found.imbalance < 1.02, sum(found.work) == 64 * 65 // 2 + 2 * (16 * 17 // 2)
        (True, True)
    """
    if len(lengths) != len(homes):
        raise ValueError(f"homes: got {len(homes)}; expected one for each of {len(lengths)} documents")
    for home in homes:
        if not 0 <= home < servers:
            raise ValueError(f"homes: got {home}; expected 0 to {servers - 1}")
    tasks = [
        CoreTask(i, (0, n), (0, n), h, h) for i, (n, h) in enumerate(zip(lengths, homes, strict=True)) if n
    ]
    work = np.zeros(servers)
    np.add.at(work, [t.server for t in tasks], [t.work for t in tasks])
    mean = work.mean()
    for needy in np.argsort(work, kind="stable").tolist():
        while mean - work[needy] > tolerance * mean:
            best: tuple[float, int, int] | None = None  # work for a byte, task, query where it is cut
            for n, task in enumerate(tasks):
                if work[task.server] <= mean or task.home != task.server:
                    continue
                wanted = min(mean - work[needy], work[task.server] - mean)
                for cut in _cuts(task, wanted, block):
                    part = _parts(task, cut)[1 if cut > 0 else 0]
                    moved = _moved(part, query_bytes, key_bytes)
                    if part.work and (best is None or part.work / moved > best[0]):
                        best = (part.work / moved, n, cut)
            if best is None:
                break
            task = tasks.pop(best[1])
            first, last = _parts(task, best[2])
            part, rest = (last, first) if best[2] > 0 else (first, last)
            tasks.append(part._replace(server=needy))
            if rest.work:
                tasks.append(rest)
            work[task.server] -= part.work
            work[needy] += part.work
    return sorted(tasks)


def sequence_parallel_tasks(lengths: Sequence[int], servers: int) -> list[CoreTask]:
    """Cut every document into 2 P parts, of which device r has the r-th from either end: work is equal.

    Each device needs all keys before its queries, which are gathered.

    Example:
        >>> import frugax
        >>> [task.queries for task in frugax.planner.sequence_parallel_tasks([8], 2) if task.server == 0]
        [(0, 2), (6, 8)]
    """
    tasks = []
    for i, n in enumerate(lengths):
        edges = [n * j // (2 * servers) for j in range(2 * servers + 1)]
        for j, (a, b) in enumerate(pairwise(edges)):
            server = min(j, 2 * servers - 1 - j)
            if a < b:
                tasks.append(CoreTask(i, (a, b), (0, b), server, server))
    return tasks


def core_balance(tasks: Sequence[CoreTask], *, servers: int, query_bytes: int, key_bytes: int) -> Balance:
    """Count the work of each server, and the bytes that tasks away from home move in a forward pass.

    A task away from home takes its queries along and sends outputs back. A server fetches those keys of a
    document that it needs and that are at home elsewhere, once for all its tasks.

    Args:
      tasks: as from `balance_core_attention`.
      servers: devices in all.
      query_bytes, key_bytes: of a token, as there.

    Example:
        >>> import frugax
        >>> tasks = [frugax.planner.CoreTask(0, (0, 4), (0, 4), home=0, server=1)]
        >>> frugax.planner.core_balance(tasks, servers=2, query_bytes=2, key_bytes=1)
        Balance(work=(0, 10), imbalance=2.0, bytes=20)
    """
    work, moved = [0] * servers, 0
    at_home: dict[tuple[int, int], set[tuple[int, int]]] = {}  # of a document on a device, places
    needed: dict[tuple[int, int], set[tuple[int, int]]] = {}  # of a document by a server, keys
    for task in tasks:
        work[task.server] += task.work
        if task.server != task.home:
            moved += _moved(task, query_bytes, 0)
        at_home.setdefault((task.document, task.home), set()).add(task.queries)
        needed.setdefault((task.document, task.server), set()).add(task.keys)
    for what, keys in needed.items():
        here = at_home.get(what, set())
        moved += key_bytes * (_covered(keys | here) - _covered(here))
    return Balance(tuple(work), max(work) * servers / max(1, sum(work)), moved)


def core_attention(
    q: Float[Array, "t h d"],
    k: Float[Array, "t hk d"],
    v: Float[Array, "t hk d2"],
    lengths: Sequence[int],
    tasks: Sequence[CoreTask],
    *,
    scale: float | None = None,
) -> Float[Array, "t h d2"]:
    """Do attention of packed documents task by task, and put outputs together by their log-sum-exp.

    The result is exact causal attention within each document, whatever the cut, with its gradients.

    Args:
      q, k, v: documents end to end; Hk divides H.
      lengths: tokens of each document, T in all.
      tasks: each pair of a query and a key that it sees is in one of them.
      scale: of the scores; None: D ** -0.5.

    Returns:
      The outputs, in q's dtype.

    Raises:
      ValueError: lengths don't add up to T, or tasks leave pairs out or have some twice.

    Source: Core Attention Disaggregation, 2025 (arXiv 2510.18121).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> x = jnp.ones((6, 2, 4))
        >>> tasks = frugax.planner.sequence_parallel_tasks([4, 2], 2)
        >>> frugax.planner.core_attention(x, x, x, [4, 2], tasks).shape
        (6, 2, 4)
    """
    T, H, D = q.shape
    if sum(lengths) != T:
        raise ValueError(f"lengths: got {sum(lengths)} tokens; expected {T}, those of q")
    _check_cover(tasks, lengths)
    scale = D**-0.5 if scale is None else scale
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    wide = accumulator(q.dtype)
    out = jnp.zeros((T, H, v.shape[-1]), wide)
    lse = jnp.full((T, H), _LOWEST, wide)
    for task in tasks:
        start = int(offsets[task.document])
        (a, b), (c, d) = task.queries, task.keys
        rows, columns = slice(start + a, start + b), slice(start + c, start + d)
        part, part_lse = _attend(q[rows], k[columns], v[columns], a - c, scale)
        both = jnp.logaddexp(lse[rows], part_lse)
        old, new = (jnp.exp(x - both)[..., None] for x in (lse[rows], part_lse))
        out = out.at[rows].set(out[rows] * old + part * new)
        lse = lse.at[rows].set(both)
    return out.astype(q.dtype)


def balanced_order(lengths: Sequence[int], ranks: int) -> np.ndarray:
    """Place the tokens of packed documents so that ranks have equally many, and equal work of attention.

    Each document is cut into 2 P equal parts, of which rank r has the r-th from either end. Tokens that are
    left over go one by one to the rank with fewest tokens, of these to that with least work.

    Args:
      lengths: tokens of each document, packed end to end.
      ranks: P; it divides the tokens.

    Returns:
      The places of each rank's tokens in the packed row, in order: int [P, T / P].

    Raises:
      ValueError: P does not divide the tokens.

    Source: the division by documents of arXiv 2510.18121's baseline, per-document context parallelism.

    Example:
        >>> import frugax
        >>> frugax.planner.balanced_order([4, 2, 2], 2).tolist()
        [[0, 3, 5, 6], [1, 2, 4, 7]]
    """
    total = sum(lengths)
    if ranks < 1 or total % ranks:
        raise ValueError(f"ranks: got {ranks}; expected a divisor of {total} tokens")
    places: list[list[int]] = [[] for _ in range(ranks)]
    work, start = [0] * ranks, 0
    for n in lengths:
        part = n // (2 * ranks)
        for j in range(2 * ranks):
            rank = min(j, 2 * ranks - 1 - j)
            places[rank] += range(start + j * part, start + (j + 1) * part)
            work[rank] += _pairs((j + 1) * part, n) - _pairs(j * part, n)
        for t in reversed(range(2 * ranks * part, n)):
            rank = min(range(ranks), key=lambda r: (len(places[r]), work[r], r))
            places[rank].append(start + t)
            work[rank] += t + 1
        start += n
    return np.sort(np.array(places), 1)


def _check_cover(tasks: Sequence[CoreTask], lengths: Sequence[int]) -> None:
    """Raise unless tasks have each pair of a query and a key that it sees once."""
    by_document: dict[int, list[CoreTask]] = {}
    for task in tasks:
        if not 0 <= task.document < len(lengths):
            raise ValueError(f"tasks: got document {task.document}; expected 0 to {len(lengths) - 1}")
        n = lengths[task.document]
        if not all(0 <= a <= b <= n for a, b in (task.queries, task.keys)):
            raise ValueError(f"tasks: got {task}; expected places of its {n} tokens")
        for other in by_document.setdefault(task.document, []):
            if task._replace(
                queries=_common(task.queries, other.queries), keys=_common(task.keys, other.keys)
            ).work:
                raise ValueError(f"tasks: got {task} and {other}; expected each pair once")
        by_document[task.document].append(task)
    needed, got = sum(_pairs(n, n) for n in lengths), sum(task.work for task in tasks)
    if got != needed:
        raise ValueError(f"tasks: got {got} pairs of queries and keys; expected {needed}")


def _common(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def _pairs(queries: int, keys: int) -> int:
    """Pairs of the first queries and the first keys of a document where the key is not later."""
    m = min(queries, keys)
    return m * (m + 1) // 2 + (queries - m) * keys


def _covered(ranges: set[tuple[int, int]]) -> int:
    """Places that some range covers."""
    total = end = 0
    for a, b in sorted(ranges):
        total += max(0, b - max(a, end))
        end = max(end, b)
    return total


def _moved(task: CoreTask, query_bytes: int, key_bytes: int) -> int:
    (a, b), (c, d) = task.queries, task.keys
    return 2 * query_bytes * (b - a) + key_bytes * (d - c)


def _cuts(task: CoreTask, wanted: float, block: int) -> list[int]:
    """List the places that cut off at most the wanted work: of the last queries, or (negative) the first."""
    a, b = task.queries
    if task.work <= wanted:
        return [-b]  # all of it
    # Query i sees i + 1 keys: sums of them from either end.
    first = int((np.sqrt(1 + 4 * (a * a + a + 2 * wanted)) - 1) / 2)
    last = int(np.ceil((np.sqrt(max(1.0, 1 + 4 * (b * b + b - 2 * wanted))) - 1) / 2))
    first, last = first // block * block, -(-last // block) * block
    return [cut for cut in (last, -first) if a < abs(cut) < b]


def _parts(task: CoreTask, cut: int) -> tuple[CoreTask, CoreTask]:
    """Cut a task at a query; its first part needs fewer keys."""
    (a, b), at = task.queries, abs(cut)
    return task._replace(queries=(a, at), keys=(0, at)), task._replace(queries=(at, b))


def _attend(q: Array, k: Array, v: Array, ahead: int, scale: float) -> tuple[Array, Array]:
    """Outputs and log-sum-exp [T, H]; query i sees key j where j <= i + ahead."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = scale * jnp.einsum("thd,shd->hts", q, k, preferred_element_type=accumulator(q.dtype))
    sees = jnp.arange(s.shape[1])[:, None] + ahead >= jnp.arange(s.shape[2])[None]
    s = jnp.where(sees, s, _LOWEST)
    lse = jax.nn.logsumexp(s, -1)
    p = jnp.where(sees, jnp.exp(s - lse[..., None]), 0)
    return jnp.einsum("hts,shd->thd", p, v.astype(p.dtype)), lse.T
