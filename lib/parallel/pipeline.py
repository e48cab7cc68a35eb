"""Pipeline parallelism in one compiled program: a scan over slots of a forward and a backward pass."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from .schedules import Task, task_before


class Passes(NamedTuple):
    """The forward, or the backward, passes of all slots, as tables [slots, P].

    Attributes:
      active: whether the device has such a pass in the slot.
      chunk, microbatch: of the pass.
      reads: the place of the stage's input; the first stage has none and embeds its microbatch again.
      reads_gradient: the place of the gradient that a backward pass goes on from.
      writes: the place for the message that comes after the pass; -1: none comes.
    """

    active: Any
    chunk: Any
    microbatch: Any
    reads: Any
    reads_gradient: Any
    writes: Any


class Slots(NamedTuple):
    """A schedule in time slots, each with a forward pass and then a backward pass at most.

    After the forward passes of a slot all devices send what they made to the next, after the backward passes
    to the one before. A message waits in a numbered place until it was read for the last time.

    Attributes:
      forward, backward: tables of the passes.
      places, gradient_places: how many a device needs for stage inputs, and for gradients.

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


class Pipelined(NamedTuple):
    """The result of `pipeline_gradients`.

    Attributes:
      loss: the sum of what all stages of all microbatches add to it, in float32 or wider.
      of_stages: the sum of what stages report.
      of_last: the sum of what `last` reports.
      gradients: of the loss, for (shared, layers), in float32 or wider.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> found = frugax.parallel.Pipelined(jnp.ones(()), {}, {}, (jnp.zeros(2), jnp.ones(4)))
        >>> of_shared, of_layers = found.gradients
        >>> of_layers.shape
        (4,)
    """

    loss: Array
    of_stages: Any
    of_last: Any
    gradients: tuple[Any, Any]


def pipeline_gradients(
    first: Callable[[Any, Any], Any],
    stage: Callable[[Any, Any, Any, Any, Array], tuple[Any, Array, Any]],
    last: Callable[[Any, Any, Any], tuple[Array, Any]],
    shared: Any,
    layers: Any,
    microbatches: Any,
    *,
    schedule: Sequence[Sequence[Task]],
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: str = "pipeline",
) -> Pipelined:
    """Compute loss and gradients of a stack of layers that is split over devices, by a pipeline schedule.

    A scan runs the slots of `pipeline_slots`. A device keeps the inputs of its stages for microbatches in
    flight and nothing else of them: a backward pass computes its stage again. Only `axis_name` is manual:
    over the other axes of the mesh arrays lie, and the compiler splits the stages, as without a pipeline.

    All devices run the same passes of a slot together, so that collectives inside a stage meet everywhere.
    Those without a task in it, while the pipeline fills and drains, compute what nobody keeps. Devices so go
    in step. Schedules that are made for it (chunks above 1, or `in_step`) have the bubble that
    `pipeline_timeline` tells; plain 1F1B, with half as many microbatches in flight, waits every other slot.

    Args:
      first: (shared, microbatch) -> x, what the first stage reads: floating arrays of one shape throughout.
      stage: (shared, its layers [L / (v P), ...], x, microbatch, number) -> x, loss, report. The number, a
        traced int32, counts stages from 0 to v P - 1. The loss is what this stage adds, such as a balance
        loss of experts, or 0; a report is a tree of floating arrays that are summed, and get no gradient.
      last: (shared, x, microbatch) -> loss, report.
      shared: params that any of the three may read, the same on every rank. Their gradients are added up.
      layers: params of all layers in their order, L in front. With v chunks of layers for each of P ranks,
        stage number c P + r is chunk c of rank r. Placed over `axis_name` in their order, they need no
        message to get there where v is 1; else each step moves them, and their gradients, once.
      microbatches: trees of arrays, M in front, the same on every rank.
      schedule: from `pipeline_schedule`, or your own in its form.
      mesh: has `axis_name`, with a device for each row of the schedule; None: that of `jax.set_mesh`.

    Returns:
      Loss, reports and gradients as of the sum over microbatches on one device.

    Raises:
      ValueError: layers don't divide into stages, or mesh, schedule and microbatches disagree in size.

    Source: Narayanan et al. 2021, Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM (arXiv 2104.04473); Huang et al. 2019, GPipe (1811.06965), for the second forward pass.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = frugax.parallel.make_mesh(pipeline=1, devices=jax.devices()[:1])
        >>> first = lambda shared, rows: shared * rows
        >>> stage = lambda shared, layers, x, rows, number: (jnp.tanh(layers[0] * x), 0.0, {})
        >>> last = lambda shared, x, rows: (jnp.sum(x), {})
        >>> schedule = frugax.parallel.pipeline_schedule(1, 3)
        >>> shared, layers, rows = jnp.array(0.5), jnp.array([2.0]), jnp.ones((3, 4))
        >>> run = lambda *args: frugax.parallel.pipeline_gradients(
        ...     first, stage, last, *args, schedule=schedule, mesh=mesh)
        >>> found = jax.jit(run)(shared, layers, rows)
        >>> bool(jnp.allclose(found.loss, 12 * jnp.tanh(1.0)))
        True
    """
    P = len(schedule)
    v = 1 + max(task.chunk for tasks in schedule for task in tasks)
    M = 1 + max(task.microbatch for tasks in schedule for task in tasks)
    there = (mesh or jax.sharding.get_abstract_mesh()).shape
    if there.get(axis_name) != P:
        raise ValueError(
            f"schedule: got {P} devices; expected as many as the mesh {dict(there)} has of {axis_name!r}"
        )
    for x in jax.tree.leaves(microbatches):
        if x.shape[:1] != (M,):
            raise ValueError(f"microbatches: got {list(x.shape)}; expected {M} in front, as in the schedule")
    for x in jax.tree.leaves(layers):
        if not x.ndim or x.shape[0] % (P * v):
            raise ValueError(
                f"layers: got {x.shape[0] if x.ndim else 'none'}; expected a multiple of {P * v} "
                f"({P} stages times {v} chunks)"
            )
    by_rank = PartitionSpec(None, axis_name)
    cut = jax.tree.map(lambda x: x.reshape(v, P, x.shape[0] // (v * P), *x.shape[1:]), layers)
    run = jax.shard_map(
        functools.partial(_run, first, stage, last, pipeline_slots(schedule), P, v, axis_name),
        mesh=mesh,
        in_specs=(PartitionSpec(), by_rank, PartitionSpec()),
        out_specs=Pipelined(PartitionSpec(), PartitionSpec(), PartitionSpec(), (PartitionSpec(), by_rank)),
        axis_names={axis_name},
        check_vma=False,  # zeros that stages make inside would each have to be typed as varying
    )
    found = run(shared, cut, microbatches)
    of_shared, of_layers = found.gradients
    of_layers = jax.tree.map(lambda g, x: g.reshape(x.shape), of_layers, layers)
    return found._replace(gradients=(of_shared, of_layers))


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
    waits: list[tuple[int, int, int, Task]] = []  # a message's arrival, last reading, rank and task
    for (rank, task), time in when.items():
        table, at = tables[task.direction], (time // 2, rank)
        table.active[at], table.chunk[at], table.microbatch[at] = True, task.chunk, task.microbatch
        before = task_before(rank, task, P, v)
        if before is None or before == (rank, task._replace(direction="forward")):
            continue  # the first stage's forward pass and the last one's backward pass get no message
        until = time if task.direction == "backward" else when[rank, task._replace(direction="backward")]
        waits.append((when[before], until, rank, task))

    free: dict[tuple[str, int], list[int]] = {}  # for each place the time of its last reading
    for arrives, until, rank, task in sorted(waits, key=lambda wait: wait[:3]):
        times = free.setdefault((task.direction, rank), [])
        place = next((i for i, time in enumerate(times) if time <= arrives), len(times))
        times[place : place + 1] = [until]
        tables[task.direction].writes[arrives // 2, rank] = place
        if task.direction == "forward":
            tables["forward"].reads[when[rank, task] // 2, rank] = place
            tables["backward"].reads[until // 2, rank] = place
        else:
            tables["backward"].reads_gradient[until // 2, rank] = place
    most = {
        direction: max([1, *(len(times) for (of, _), times in free.items() if of == direction)])
        for direction in tables
    }
    return Slots(tables["forward"], tables["backward"], most["forward"], most["backward"])


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
    active, writes = np.zeros(shape, bool), np.full(shape, -1, np.int32)
    return Passes(active, chunk, microbatch, reads, reads_gradient, writes)


def _run(first, stage, last, slots, P, v, axis_name, shared, layers, microbatches) -> Pipelined:
    """The program of one rank: layers [v, 1, n, ...] are its own."""
    rank = jax.lax.axis_index(axis_name)
    layers = jax.tree.map(lambda x: x.squeeze(1), layers)
    shapes = jax.eval_shape(first, shared, _at(microbatches, 0))
    _, loss, of_stage = jax.eval_shape(stage, shared, _at(layers, 0), shapes, _at(microbatches, 0), rank)
    loss_last, of_last = jax.eval_shape(last, shared, shapes, _at(microbatches, 0))
    wide = jnp.result_type(loss, loss_last, jnp.float32)

    def read(task, inputs):
        """The microbatch, the stage's number, its layers and its input."""
        microbatch = _at(microbatches, task.microbatch)
        number = task.chunk * P + rank
        mine = _at(layers, task.chunk if v > 1 else 0)
        x = _at(inputs, task.reads)
        return microbatch, number, mine, _where(number == 0, first(shared, microbatch), x)

    def forward(task, inputs):
        microbatch, number, mine, x = read(task, inputs)
        return stage(shared, mine, x, microbatch, number)[0]

    def backward(task, any_first, any_last, inputs, gradients, sums):
        microbatch, number, mine, x = read(task, inputs)
        is_first, is_last = task.active & (number == 0), task.active & (number == P * v - 1)
        of_shared, of_layers = sums.gradients

        def own(shared, mine, x):
            y, loss, report = stage(shared, mine, x, microbatch, number)
            return (y, jnp.asarray(loss, wide)), report

        def from_loss(total, dy):
            value = jax.value_and_grad(last, (0, 1), has_aux=True)(shared, y, microbatch)
            (loss, report), (d_shared, own_dy) = _where(is_last, value, _zeros(value))
            return jnp.asarray(loss, wide), report, _add(total, d_shared), _where(is_last, own_dy, dy)

        def from_message(total, dy):
            return jnp.zeros((), wide), _zeros(of_last), total, dy

        (y, loss), pull, report = jax.vjp(own, shared, mine, x, has_aux=True)
        message = _at(gradients, task.reads_gradient)
        loss_last, report_last, of_shared, dy = jax.lax.cond(
            any_last, from_loss, from_message, of_shared, message
        )
        # What an idle device computes may be anything, so it is left out, not multiplied by zero.
        found = (loss, report, *pull((dy, jnp.ones((), wide))))
        loss, report, d_shared, d_layers, dx = _where(task.active, found, _zeros(found))
        of_shared = jax.lax.cond(
            any_first,
            lambda total: _add(
                total, jax.vjp(lambda s: first(s, microbatch), shared)[1](_where(is_first, dx, _zeros(dx)))[0]
            ),
            lambda total: total,
            _add(of_shared, d_shared),
        )
        chunk = task.chunk if v > 1 else 0
        of_layers = jax.tree.map(
            lambda total, g: total.at[chunk].add(g.astype(total.dtype)), of_layers, d_layers
        )
        return dx, Pipelined(
            sums.loss + loss + loss_last,
            _add(sums.of_stages, report),
            _add(sums.of_last, report_last),
            (of_shared, of_layers),
        )

    ring = [(i, (i + 1) % P) for i in range(P)] if v > 1 else [(i, i + 1) for i in range(P - 1)]
    back = [(j, i) for i, j in ring]

    def slot(carry, tables):
        inputs, gradients, sums = carry
        ahead, behind, any_ahead, any_behind, any_first, any_last = tables
        inputs = jax.lax.cond(
            any_ahead,
            lambda inputs: _keep(
                inputs, jax.lax.ppermute(forward(ahead, inputs), axis_name, ring), ahead.writes
            ),
            lambda inputs: inputs,
            inputs,
        )

        def go_back(gradients, sums):
            dx, sums = backward(behind, any_first, any_last, inputs, gradients, sums)
            return _keep(gradients, jax.lax.ppermute(dx, axis_name, back), behind.writes), sums

        gradients, sums = jax.lax.cond(any_behind, go_back, lambda *same: same, gradients, sums)
        return (inputs, gradients, sums), None

    def places(count):
        return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)

    widened = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), (shared, layers)
    )
    sums = Pipelined(jnp.zeros((), wide), _zeros(of_stage), _zeros(of_last), widened)
    f, b = slots.forward, slots.backward
    mine = jax.tree.map(lambda table: jnp.asarray(table)[:, rank], (f, b))
    is_first = b.active[:, 0] & (b.chunk[:, 0] == 0)
    is_last = b.active[:, -1] & (b.chunk[:, -1] == v - 1)
    # The same on every device, so that all take the same branch.
    common = tuple(jnp.asarray(x) for x in (f.active.any(1), b.active.any(1), is_first, is_last))
    begin = places(slots.places), places(slots.gradient_places), sums
    (_, _, sums), _ = jax.lax.scan(slot, begin, (*mine, *common))
    of_shared, of_layers = sums.gradients
    of_layers = jax.tree.map(lambda x: x[:, None], of_layers)  # they stay; the rest is added up over ranks
    whole = jax.lax.psum((sums.loss, sums.of_stages, sums.of_last, of_shared), axis_name)
    return Pipelined(whole[0], whole[1], whole[2], (whole[3], of_layers))


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _keep(places: Any, message: Any, place: Array) -> Any:
    """Put a message into its place, or nothing anywhere where the place is -1."""

    def put(of_places, x):
        at = jnp.maximum(place, 0)
        return of_places.at[at].set(jnp.where(place >= 0, x, of_places[at]))

    return jax.tree.map(put, places, message)


def _where(condition: Array, x: Any, y: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda a, b: a + jnp.asarray(b, a.dtype), total, more)
