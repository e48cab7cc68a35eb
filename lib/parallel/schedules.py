"""Schedules of pipeline parallelism: which microbatch each stage works on and when, and what that costs."""

from collections.abc import Sequence
from typing import Literal, NamedTuple


class Task(NamedTuple):
    """One pass of one microbatch through one chunk of layers of a device."""

    direction: Literal["forward", "backward"]
    chunk: int
    microbatch: int


class Timeline(NamedTuple):
    """The costs of a schedule.

    Attributes:
      seconds: from the first task to the last one's end.
      bubble: idle time of a device over its work.
      in_flight: for each device, the most microbatches whose activations it holds at once; a chunk of v
        counts as 1 / v.
      starts: for each device, the second at which each of its tasks starts.

    Example:
        >>> import frugax
        >>> schedule = frugax.parallel.pipeline_schedule(2, 4)
        >>> frugax.parallel.pipeline_timeline(schedule).in_flight
        (2.0, 1.0)
    """

    seconds: float
    bubble: float
    in_flight: tuple[float, ...]
    starts: tuple[tuple[float, ...], ...]


def pipeline_schedule(
    stages: int, microbatches: int, *, chunks: int = 1, in_step: bool = False
) -> tuple[tuple[Task, ...], ...]:
    """Order the tasks of each device: one forward, one backward (1F1B), interleaved with several chunks.

    A device first takes as many forward passes as fill the pipeline behind it, then one forward and one
    backward pass by turns, then the backward passes that are left: it holds activations of `stages`
    microbatches at most, where all forward passes first would hold all. With v chunks device r has layers r,
    r + P, r + 2 P, ... of v * P equal parts, so that the pipeline fills v times as fast, for v times the
    messages.

    Args:
      stages: devices P of the pipeline.
      microbatches: parts of a batch, M.
      chunks: v. With more than one, M is a multiple of P.
      in_step: device r of one chunk takes 2 (P - 1 - r) passes ahead, where P - 1 - r fill the pipeline by
        the clock. Devices that exchange messages at the same moments, as those of `pipeline_gradients` do,
        then never wait: a message and its answer take two moments a stage. With chunks it is always so.

    Returns:
      For each device its tasks in order.

    Raises:
      ValueError: a number is below 1, or P does not divide M with several chunks.

    Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM (arXiv 2104.04473).

    Example:
        >>> import frugax
        >>> first, last = frugax.parallel.pipeline_schedule(2, 2)
        >>> [(task.direction[0], task.microbatch) for task in last]
        [('f', 0), ('b', 0), ('f', 1), ('b', 1)]
    """
    P, M, v = stages, microbatches, chunks
    for name, value in (("stages", P), ("microbatches", M), ("chunks", v)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; expected at least 1")
    if v > 1 and M % P:
        raise ValueError(f"microbatches: got {M}; expected a multiple of {P} stages for {v} chunks")

    def task(direction: Literal["forward", "backward"], number: int) -> Task:
        """The number-th pass: P microbatches through one chunk, then the same through the next."""
        if v == 1:
            return Task(direction, 0, number)
        round_, within = divmod(number, P * v)
        chunk, place = divmod(within, P)
        return Task(direction, chunk if direction == "forward" else v - 1 - chunk, round_ * P + place)

    devices = []
    for rank in range(P):
        ahead = P - 1 - rank if v == 1 and not in_step else 2 * (P - 1 - rank) + (v - 1) * P
        ahead = min(ahead, M * v)
        order = [task("forward", n) for n in range(ahead)]
        for n in range(M * v - ahead):
            order += [task("forward", ahead + n), task("backward", n)]
        order += [task("backward", n) for n in range(M * v - ahead, M * v)]
        devices.append(tuple(order))
    return tuple(devices)


def pipeline_timeline(
    schedule: Sequence[Sequence[Task]], *, forward: float = 1.0, backward: float = 2.0, send: float = 0.0
) -> Timeline:
    """Run a schedule by the clock: each task starts when its device is free and its input is there.

    Args:
      schedule: the tasks of each device, in order.
      forward, backward: seconds of a microbatch's pass through all layers of a device.
      send: seconds of a message from one device to another.

    Returns:
      Its `Timeline`. Of 1F1B the bubble is (P - 1) / (v M) where messages take no time.

    Raises:
      ValueError: tasks wait for each other.

    Source: Narayanan et al. 2021 (arXiv 2104.04473).

    Example:
        >>> import frugax
        >>> schedule = frugax.parallel.pipeline_schedule(4, 8, chunks=2)
        >>> round(frugax.parallel.pipeline_timeline(schedule).bubble, 4) == 3 / (2 * 8)
        True
    """
    P = len(schedule)
    v = 1 + max(task.chunk for tasks in schedule for task in tasks)
    lasts = {"forward": forward / v, "backward": backward / v}
    ends: dict[tuple[int, Task], float] = {}
    free, done = [0.0] * P, [0] * P
    starts: list[list[float]] = [[] for _ in range(P)]

    def ready(rank: int, task: Task) -> float | None:
        """When the task's input is there; None: not known yet."""
        before = task_before(rank, task, P, v)
        if before is None:
            return 0.0
        other, _ = before
        end = ends.get(before)
        return None if end is None else end + (send if other != rank else 0.0)

    while any(done[rank] < len(schedule[rank]) for rank in range(P)):
        moved = False
        for rank in range(P):
            while done[rank] < len(schedule[rank]):
                task = schedule[rank][done[rank]]
                at = ready(rank, task)
                if at is None:
                    break
                start = max(at, free[rank])
                starts[rank].append(start)
                free[rank] = ends[rank, task] = start + lasts[task.direction]
                done[rank] += 1
                moved = True
        if not moved:
            waiting = [schedule[rank][done[rank]] for rank in range(P) if done[rank] < len(schedule[rank])]
            raise ValueError(f"schedule: got tasks that wait for each other, first {waiting[0]}")
    seconds = max(free)
    work = max(sum(lasts[task.direction] for task in tasks) for tasks in schedule)
    return Timeline(
        seconds, seconds / work - 1, tuple(_most(tasks, v) for tasks in schedule), _frozen(starts)
    )


def task_before(rank: int, task: Task, devices: int, chunks: int) -> tuple[int, Task] | None:
    """The task that makes another's input: that of the layers before it, or behind it going backward."""
    direction, chunk, _ = task
    if direction == "forward":
        if rank:
            return rank - 1, task
        return (devices - 1, task._replace(chunk=chunk - 1)) if chunk else None
    if rank < devices - 1:
        return rank + 1, task
    if chunk < chunks - 1:
        return 0, task._replace(chunk=chunk + 1)
    return rank, task._replace(direction="forward")


def _most(tasks: Sequence[Task], chunks: int) -> float:
    held = most = 0
    for task in tasks:
        held += 1 if task.direction == "forward" else -1
        most = max(most, held)
    return most / chunks


def _frozen(lists: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, lists))
