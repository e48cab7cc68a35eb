"""Groups of devices that split sequences to different degrees, chosen for the lengths of each step."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh


class SequenceCosts(NamedTuple):
    """Costs of sequences on a group of d devices that split each of them.

        seconds = sum_s (quadratic s^2 + linear s + moved s / bandwidth_d [d > 1]) / d + fixed

    Attributes:
      quadratic: seconds of a device for a squared token: attention.
      linear: seconds of a device for a token: all the rest.
      fixed: seconds of any group, once.
      moved: bytes of a token in a step's all-to-alls.
      bandwidth: bytes a second of a device in groups of each degree; its keys are the degrees that there are.
      capacity: tokens that a device has memory for.

    Example:
        >>> import frugax
        >>> costs = frugax.planner.SequenceCosts(1.0, 2.0, 3.0, 8.0, {1: 1.0, 2: 4.0}, 100)
        >>> costs.seconds([10], 1), costs.seconds([10], 2)
        (123.0, 73.0)
    """

    quadratic: float
    linear: float
    fixed: float
    moved: float
    bandwidth: Mapping[int, float]
    capacity: int

    def of(self, length: int, degree: int) -> float:
        """Seconds of one sequence, without what is fixed."""
        sent = self.moved * length / self.bandwidth[degree] if degree > 1 else 0.0
        return (self.quadratic * length**2 + self.linear * length + sent) / degree

    def seconds(self, lengths: Sequence[int], degree: int) -> float:
        """Seconds of a group's sequences, one after another."""
        return sum(self.of(length, degree) for length in lengths) + self.fixed


class Group(NamedTuple):
    """Devices that split the same sequences: how many, and the sequences by number."""

    degree: int
    sequences: tuple[int, ...]


def group_seconds(groups: Sequence[Group], lengths: Sequence[int], costs: SequenceCosts) -> float:
    """Seconds of groups side by side: those of the slowest.

    Example:
        >>> import frugax
        >>> costs = frugax.planner.SequenceCosts(0.0, 1.0, 0.0, 0.0, {1: 1.0, 2: 1.0}, 100)
        >>> Group = frugax.planner.Group
        >>> frugax.planner.group_seconds([Group(2, (0,)), Group(1, (1, 2))], [8, 3, 2], costs)
        5.0
    """
    return max(costs.seconds([lengths[i] for i in group.sequences], group.degree) for group in groups)


def plan_groups(
    lengths: Sequence[int],
    devices: int,
    costs: SequenceCosts,
    *,
    buckets: int | None = None,
    time_limit: float = 5.0,
) -> list[Group]:
    """Form groups and assign sequences to them, so that the slowest group is as fast as can be.

    A mixed-integer linear program: A_kp sequences of bucket k go to group p, which exists or not (m_p)

        minimize C  with  sum_p A_kp = |k|,  sum_k s_k A_kp <= capacity d_p m_p,
                          sum_k seconds(s_k, d_p) A_kp + fixed m_p <= C,  sum_p d_p m_p <= devices

    Args:
      lengths: tokens of each sequence.
      devices: in all.
      costs: of sequences on groups of each degree.
      buckets: so many, whose sequences all count as the longest of them; None: each for itself.
      time_limit: seconds of the solver, which then gives the best it has.

    Returns:
      The groups that have sequences, those of larger degrees first.

    Raises:
      ValueError: no groups of these devices have memory for the sequences, or none were found in time.

    Source: Wang et al. 2024, FlexSP (arXiv 2412.01523).

    Example:
        >>> import frugax
        >>> costs = frugax.planner.SequenceCosts(1e-3, 1.0, 1.0, 4.0, {1: 1.0, 2: 4.0, 4: 2.0}, 64)
        >>> frugax.planner.plan_groups([100, 50, 60], 4, costs)
        [Group(degree=2, sequences=(0,)), Group(degree=1, sequences=(1,)), Group(degree=1, sequences=(2,))]
    """
    found = _solve(lengths, devices, costs, buckets, time_limit)
    if found is None:
        raise ValueError(
            f"lengths: got {sum(lengths)} tokens, {max(lengths)} in the longest; "
            f"expected what groups of {devices} devices with {costs.capacity} tokens each can hold"
        )
    return found


def plan_step(
    lengths: Sequence[int],
    devices: int,
    costs: SequenceCosts,
    *,
    buckets: int | None = 16,
    more: int = 2,
    time_limit: float = 5.0,
) -> list[list[Group]]:
    """Cut a step's sequences into microbatches, and plan the groups of each.

    Tries the fewest microbatches that fit in memory, then `more` numbers; the least sum of seconds wins.

    Args:
      lengths, devices, costs, buckets, time_limit: as in `plan_groups`.
      more: numbers of microbatches to try after the first that fits.

    Returns:
      For each microbatch its groups; sequences keep their numbers in `lengths`.

    Raises:
      ValueError: a sequence is longer than any group holds.

    Source: Wang et al. 2024, FlexSP (arXiv 2412.01523).

    Example:
        >>> import frugax
        >>> costs = frugax.planner.SequenceCosts(0.0, 1.0, 0.0, 0.0, {1: 1.0, 2: 1.0}, 10)
        >>> step = frugax.planner.plan_step([9, 9, 8, 8], 2, costs)
        >>> len(step), sorted(i for groups in step for group in groups for i in group.sequences)
        (2, [0, 1, 2, 3])
    """
    longest = costs.capacity * max(d for d in costs.bandwidth if d <= devices)
    if max(lengths) > longest:
        raise ValueError(f"lengths: got a sequence of {max(lengths)} tokens; expected at most {longest}")
    best, least, tried = None, math.inf, 0
    for count in range(max(1, -(-sum(lengths) // (costs.capacity * devices))), len(lengths) + 1):
        step, seconds = [], 0.0
        for chosen in split_microbatches(lengths, count):
            these = [lengths[i] for i in chosen]
            groups = _solve(these, devices, costs, buckets, time_limit)
            if groups is None:
                break
            seconds += group_seconds(groups, these, costs)
            step.append([Group(g.degree, tuple(chosen[i] for i in g.sequences)) for g in groups])
        else:
            tried += 1
            if seconds < least:
                best, least = step, seconds
        if tried > more:
            break
    assert best is not None  # one sequence a microbatch fits, as was checked
    return best


def bucket_lengths(lengths: Sequence[int], buckets: int) -> list[list[int]]:
    """Sort sequences into buckets so that the least is added where each counts as the longest of its bucket.

    Exact, by dynamic programming over the sorted lengths.

    Args:
      lengths: tokens of each sequence.
      buckets: how many at most.

    Returns:
      The numbers of the sequences in each bucket, longer ones later.

    Source: Wang et al. 2024, FlexSP (arXiv 2412.01523).

    Example:
        >>> import frugax
        >>> frugax.planner.bucket_lengths([9, 2, 10, 3], 2)
        [[1, 3], [0, 2]]
    """
    order = np.argsort(lengths, kind="stable")
    s = np.asarray(lengths)[order]
    n, before = len(s), np.concatenate([[0], np.cumsum(s)])
    start, end = np.arange(n)[:, None], np.arange(1, n + 1)
    # Tokens added by the bucket of sequences start to end - 1.
    added = np.where(start < end, s[end - 1] * (end - start) - (before[end] - before[start]), np.inf)
    total, cuts = added[0], []
    for _ in range(min(buckets, n) - 1):
        ways = np.concatenate([[np.inf], total[:-1]])[:, None] + added
        better = ways.min(0) < total
        cuts.append(np.where(better, ways.argmin(0), -1))  # -1: as with one bucket fewer
        total = np.where(better, ways.min(0), total)
    edges = [n]
    for cut in reversed(cuts):
        if edges[0] and cut[edges[0] - 1] >= 0:
            edges.insert(0, int(cut[edges[0] - 1]))
    edges = [0, *edges]
    return [order[a:b].tolist() for a, b in pairwise(edges)]


def split_microbatches(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Cut sequences, sorted by length, into runs so that the most tokens of a run are the fewest.

    Sequences of like lengths come together, so that few degrees serve a microbatch well.

    Args:
      lengths: tokens of each sequence.
      count: of the runs, at most.

    Returns:
      The numbers of the sequences in each run.

    Source: Wang et al. 2024, FlexSP (arXiv 2412.01523).

    Example:
        >>> import frugax
        >>> frugax.planner.split_microbatches([5, 1, 4, 2], 2)
        [[1, 3, 2], [0]]
    """
    order = np.argsort(lengths, kind="stable").tolist()

    def runs(most: int) -> list[list[int]]:
        found: list[list[int]] = [[]]
        held = 0
        for i in order:
            if held + lengths[i] > most and found[-1]:
                found.append([])
                held = 0
            found[-1].append(i)
            held += lengths[i]
        return found

    low, high = max(lengths), sum(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= count else (middle + 1, high)
    return runs(low)


def group_meshes(
    groups: Sequence[Group], devices: Sequence[jax.Device] | None = None, *, axis_name: str = "sequence"
) -> list[Mesh]:
    """Give each group neighbouring devices, as a mesh with one axis.

    Args:
      groups: of one microbatch.
      devices: which; None: all.
      axis_name: of the axis.

    Raises:
      ValueError: groups need more devices than there are.

    Example:
        >>> import frugax
        >>> frugax.planner.group_meshes([frugax.planner.Group(1, (0,))])[0].shape["sequence"]
        1
    """
    devices = list(jax.devices() if devices is None else devices)
    needed = sum(group.degree for group in groups)
    if needed > len(devices):
        raise ValueError(f"groups: got {needed} devices in all; expected at most {len(devices)}")
    meshes, first = [], 0
    for group in groups:
        meshes.append(Mesh(np.array(devices[first : first + group.degree]), (axis_name,)))
        first += group.degree
    return meshes


def _solve(
    lengths: Sequence[int], devices: int, costs: SequenceCosts, buckets: int | None, time_limit: float
) -> list[Group] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp  # a slow import, and needed here alone
    from scipy.sparse import coo_array

    members = bucket_lengths(lengths, len(lengths) if buckets is None else buckets)
    longest = [max(lengths[i] for i in bucket) for bucket in members]
    degrees = sorted((d for d in costs.bandwidth if d <= devices), reverse=True)
    slots = [d for d in degrees for _ in range(devices // d)]
    K, P = len(members), len(slots)
    # Variables: A_kp (K * P), m_p (P), C.
    assign = np.arange(K * P).reshape(K, P)
    exists = K * P + np.arange(P)
    most = K * P + P
    rows: list[tuple[dict[int, float], float, float]] = []  # coefficients, least, most
    for k in range(K):
        rows.append(({int(v): 1.0 for v in assign[k]}, len(members[k]), len(members[k])))
    for p, d in enumerate(slots):
        tokens = {int(assign[k, p]): float(longest[k]) for k in range(K)}
        rows.append((tokens | {int(exists[p]): -float(costs.capacity * d)}, -np.inf, 0))
        seconds = {int(assign[k, p]): costs.of(longest[k], d) for k in range(K)}
        rows.append((seconds | {int(exists[p]): costs.fixed, most: -1.0}, -np.inf, 0))
        if p and slots[p - 1] == d:  # of equal groups the first exist
            rows.append(({int(exists[p - 1]): 1.0, int(exists[p]): -1.0}, 0, np.inf))
    rows.append(({int(exists[p]): float(d) for p, d in enumerate(slots)}, -np.inf, devices))
    entries = [(i, j, x) for i, (row, _, _) in enumerate(rows) for j, x in row.items()]
    i, j, x = (np.array(column) for column in zip(*entries, strict=True))
    matrix = coo_array((x, (i, j)), shape=(len(rows), most + 1)).tocsr()
    upper = np.concatenate([np.repeat([len(m) for m in members], P), np.ones(P), [np.inf]])
    found = milp(
        np.eye(most + 1)[most],
        integrality=np.arange(most + 1) < most,
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows]),
        options={"time_limit": time_limit},
    )
    if found.x is None:
        if found.status == 1:
            raise ValueError(f"time_limit: got {time_limit} s; expected enough to find any groups")
        return None
    counts = np.rint(found.x[: K * P]).astype(int).reshape(K, P)
    left = [list(bucket) for bucket in members]
    groups = []
    for p, d in enumerate(slots):
        mine = [left[k].pop() for k in range(K) for _ in range(counts[k, p])]
        if mine:
            groups.append(Group(d, tuple(sorted(mine))))
    return groups
