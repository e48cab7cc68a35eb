"""The time slots of a pipeline's schedule, and the places where messages wait between them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .schedules import Task, task_before


class Passes(NamedTuple):
    """The forward, or the backward, passes of all slots, as tables [slots, P].

    Attributes:
      active: whether the device has such a pass in the slot.
      chunk, microbatch: of the pass.
      reads: the place of the stage's input; the first stage has none and embeds its microbatch again.
      reads_gradient: the place of the gradient that a backward pass goes on from.
      carried: the place of what the stage's layers carried into the forward pass, which puts it there for
        the backward pass to read; -1: no such pass.
      writes: the place for the message that comes after the pass; -1: none comes.
    """

    active: Any
    chunk: Any
    microbatch: Any
    reads: Any
    reads_gradient: Any
    carried: Any
    writes: Any


class Slots(NamedTuple):
    """A schedule in time slots, each with a forward pass and then a backward pass at most.

    After the forward passes of a slot all devices send what they made to the next, after the backward passes
    to the one before. A message waits in a numbered place until it was read for the last time.

    Attributes:
      forward, backward: tables of the passes.
      places, gradient_places, carried_places: how many a device needs for stage inputs, for gradients, and
        for what layers carry.

    Example:
        >>> import frugax
        >>> schedule = frugax.parallel.pipeline_schedule(4, 8, chunks=2)
        >>> slots = frugax.parallel.pipeline_slots(schedule)
        >>> busy = slots.forward.active.any(1).sum()
        >>> int(busy), 2 * 8 + 4 - 1  # v M + P - 1: a bubble of (P - 1) / (v M), the paper's
        (19, 19)
    """

    forward: Passes
    backward: Passes
    places: int
    gradient_places: int
    carried_places: int


def pipeline_slots(schedule: Sequence[Sequence[Task]]) -> Slots:
    """Lay a schedule out in time slots, and give each message a place to wait in.

    Args:
      schedule: as of `pipeline_schedule`.

    Returns:
      Its `Slots`, each task as early as its turn and its input allow.

    Raises:
      ValueError: tasks wait for each other.

    Example:
        >>> import frugax
        >>> slots = frugax.parallel.pipeline_slots(frugax.parallel.pipeline_schedule(2, 3, in_step=True))
        >>> slots.forward.active.T.astype(int).tolist(), slots.backward.active.T.astype(int).tolist()
        ([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], [[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
    """
    P = len(schedule)
    v = 1 + max(task.chunk for tasks in schedule for task in tasks)
    when = _times(schedule, P, v)
    shape = (1 + max(when.values()) // 2, P)
    tables = {direction: _no_passes(shape) for direction in ("forward", "backward")}
    # What waits on a device until a task reads it for the last time: since when, till when, where, for which.
    inputs, gradients, carried = ([] for _ in range(3))
    for (rank, task), time in when.items():
        table, at = tables[task.direction], (time // 2, rank)
        table.active[at], table.chunk[at], table.microbatch[at] = True, task.chunk, task.microbatch
        before = task_before(rank, task, P, v)
        # Nobody sends the first stage an input, nor the last one a gradient.
        if task.direction == "forward":
            until = when[rank, task._replace(direction="backward")]
            carried.append(_Wait(time, until, rank, task))
            if before is not None:
                inputs.append(_Wait(when[before], until, rank, task))
        elif before is not None and before != (rank, task._replace(direction="forward")):
            gradients.append(_Wait(when[before], time, rank, task))

    f, b = tables["forward"], tables["backward"]
    for wait, place in (inputs_at := _places(inputs)).items():
        slot = when[wait.rank, wait.task] // 2
        f.writes[wait.since // 2, wait.rank] = f.reads[slot, wait.rank] = place
        b.reads[wait.until // 2, wait.rank] = place
    for wait, place in (gradients_at := _places(gradients)).items():
        b.writes[wait.since // 2, wait.rank] = b.reads_gradient[wait.until // 2, wait.rank] = place
    for wait, place in (carried_at := _places(carried)).items():
        f.carried[wait.since // 2, wait.rank] = b.carried[wait.until // 2, wait.rank] = place
    return Slots(f, b, *(1 + max(at.values(), default=0) for at in (inputs_at, gradients_at, carried_at)))


class _Wait(NamedTuple):
    """A message that a device keeps for a task, from its arrival to its last reading, in half slots."""

    since: int
    until: int
    rank: int
    task: Task


def _places(waits: Sequence[_Wait]) -> dict[_Wait, int]:
    """The first place of its rank that is free when a message arrives, for each."""
    places: dict[_Wait, int] = {}
    free: dict[int, list[int]] = {}  # when each place of a rank was read for the last time
    for wait in sorted(waits):
        times = free.setdefault(wait.rank, [])
        places[wait] = next((i for i, time in enumerate(times) if time <= wait.since), len(times))
        times[places[wait] : places[wait] + 1] = [wait.until]
    return places


def _times(schedule: Sequence[Sequence[Task]], P: int, v: int) -> dict[tuple[int, Task], int]:
    """When each task runs: twice its slot, and one more for a backward pass."""
    when: dict[tuple[int, Task], int] = {}
    done, last = [0] * P, [-1] * P
    while any(done[rank] < len(schedule[rank]) for rank in range(P)):
        before_this_round = len(when)
        for rank in range(P):
            while done[rank] < len(schedule[rank]):
                task = schedule[rank][done[rank]]
                before = task_before(rank, task, P, v)
                if before is not None and before not in when:
                    break
                time = 1 + max(last[rank], -1 if before is None else when[before])
                time += (time % 2 == 1) != (task.direction == "backward")
                when[rank, task] = last[rank] = time
                done[rank] += 1
        if len(when) == before_this_round:
            waiting = [schedule[rank][done[rank]] for rank in range(P) if done[rank] < len(schedule[rank])]
            raise ValueError(f"schedule: got tasks that wait for each other, first {waiting[0]}")
    return when


def _no_passes(shape: tuple[int, int]) -> Passes:
    chunk, microbatch, reads, reads_gradient = (np.zeros(shape, np.int32) for _ in range(4))
    carried, writes = (np.full(shape, -1, np.int32) for _ in range(2))
    return Passes(np.zeros(shape, bool), chunk, microbatch, reads, reads_gradient, carried, writes)
