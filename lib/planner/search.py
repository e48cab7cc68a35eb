"""The best way to split training over devices: a search over meshes, and over places of their devices."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .latency import Cluster, Configuration, Workload, device_bytes, latency


class Found(NamedTuple):
    """A configuration, the devices of its mesh in order, and what it costs."""

    configuration: Configuration
    placement: tuple[int, ...]
    seconds: float
    bytes: int


def configurations(
    work: Workload,
    devices: int,
    *,
    axes: Sequence[str] = ("pipeline", "data", "fsdp", "tensor"),
    given: Mapping[str, int] | None = None,
) -> Iterator[Configuration]:
    """Yield each way to use all devices whose sizes divide the model's.

    Stages divide layers, copies and microbatches divide the batch, and the sequence axis divides time.

    Args:
      work: of the model.
      devices: in all.
      axes: names of the axes whose sizes are free; the others have 1, but for those in `given`.
      given: sizes by axis name; None: none.

    Raises:
      ValueError: a name is none of an axis.

    Example:
        >>> import frugax
        >>> work = frugax.planner.transformer_workload(layers=2, width=64, batch=2, time=32)
        >>> [c.axes for c in frugax.planner.configurations(work, 2) if c.microbatch == 1]
        [(1, 1, 1, 1, 2), (1, 1, 2, 1, 1), (1, 2, 1, 1, 1), (2, 1, 1, 1, 1)]
    """
    names, given = Configuration._fields[:5], given or {}
    for name in (*axes, *given):
        if name not in names:
            raise ValueError(f"axes: got {name!r}; expected some of {', '.join(names)}")
    sizes = [
        [given[name]] if name in given else _divisors(devices) if name in axes else [1] for name in names
    ]
    for pipeline, data, fsdp, sequence, tensor in itertools.product(*sizes):
        copies = data * fsdp
        if pipeline * copies * sequence * tensor != devices:
            continue
        if work.layers % pipeline or work.batch % copies or work.time % sequence:
            continue
        for microbatch in _divisors(work.batch // copies):
            yield Configuration(pipeline, data, fsdp, sequence, tensor, microbatch)


def place(
    work: Workload, c: Configuration, cluster: Cluster, *, steps: int = 2000, seed: int = 0
) -> tuple[tuple[int, ...], float]:
    """Choose which device takes which place of a mesh, by simulated annealing from their given order.

    A step swaps two devices, moves one, turns a run of them round, or moves a run, either way round. A worse
    order is taken with a probability that falls with the temperature, from a tenth of the first latency to a
    thousandth of that.

    Args:
      work, c, cluster: as in `latency`.
      steps: orders tried.
      seed: of the choices; the same gives the same.

    Returns:
      The best order found and its seconds, never more than those of the given order.

    Source: Yim et al. 2024, Pipette (arXiv 2405.18093).

    Example:
        >>> import frugax, numpy as np
        >>> work = frugax.planner.transformer_workload(layers=4, width=64, batch=8, time=32)
        >>> slow = np.full((4, 4), 1e8)
        >>> slow[[0, 2, 1, 3], [2, 0, 3, 1]] = 1e10  # 0 is near 2, and 1 near 3
        >>> cluster = frugax.planner.Cluster(slow, flops=1e12, memory=1e9)
        >>> order, _ = frugax.planner.place(work, frugax.planner.Configuration(tensor=2, data=2), cluster)
        >>> sorted(map(sorted, np.reshape(order, (2, 2)).tolist()))
        [[0, 2], [1, 3]]
    """
    rng = np.random.default_rng(seed)
    D = len(cluster.bandwidth)
    now = list(range(D))
    cost = start = latency(work, c, cluster, now).seconds
    best, least = tuple(now), cost
    if D < 2:
        return best, least
    for step in range(steps):
        other = now.copy()
        i, j = sorted(rng.choice(D, 2, replace=False).tolist())
        move = rng.integers(5)
        if move == 0:
            other[i], other[j] = other[j], other[i]
        elif move == 1:
            other.insert(i, other.pop(j))
        elif move == 2:
            other[i : j + 1] = other[i : j + 1][::-1]
        else:
            run, left = other[i : j + 1], other[:i] + other[j + 1 :]
            at = rng.integers(len(left) + 1)
            other = left[:at] + (run if move == 3 else run[::-1]) + left[at:]
        new = latency(work, c, cluster, other).seconds
        temperature = 0.1 * start * 1e-3 ** (step / steps)
        if new <= cost or rng.random() < math.exp((cost - new) / temperature):
            now, cost = other, new
        if cost < least:
            best, least = tuple(now), cost
    return best, least


def search(
    work: Workload,
    cluster: Cluster,
    *,
    axes: Sequence[str] = ("pipeline", "data", "fsdp", "tensor"),
    given: Mapping[str, int] | None = None,
    steps: int = 2000,
    seed: int = 0,
    keep: int = 5,
) -> list[Found]:
    """Find the fastest configurations whose memory fits, and places for their devices.

    Configurations over the memory are left out, the others are ordered by their latency in the given order of
    devices, and the places of all are annealed where links differ.

    Args:
      work: of the model.
      cluster: its devices and links.
      axes, given: as in `configurations`.
      steps, seed: as in `place`.
      keep: how many to return.

    Returns:
      The best ones, fastest first; with equal seconds those of fewer bytes. None fits: an empty list.

    Source: Yim et al. 2024, Pipette (arXiv 2405.18093).

    Example:
        >>> import frugax, numpy as np
        >>> work = frugax.planner.transformer_workload(layers=4, width=256, batch=8, time=128)
        >>> cluster = frugax.planner.Cluster(np.full((4, 4), 1e10), flops=1e12, memory=30e6)
        >>> best = frugax.planner.search(work, cluster)[0]
        >>> best.bytes <= 30e6
        True
    """
    same = len(np.unique(cluster.bandwidth[~np.eye(len(cluster.bandwidth), dtype=bool)])) < 2
    found = []
    for c in configurations(work, len(cluster.bandwidth), axes=axes, given=given):
        needed = device_bytes(work, c)
        if needed > cluster.memory:
            continue
        order, seconds = place(work, c, cluster, steps=0 if same else steps, seed=seed)
        found.append(Found(c, order, seconds, needed))
    return sorted(found, key=lambda f: (f.seconds, f.bytes))[:keep]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
