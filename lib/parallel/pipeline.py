"""Pipeline parallelism in one compiled program: a scan over slots of a forward and a backward pass."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from .schedules import Task
from .slots import pipeline_slots


class Pipelined(NamedTuple):
    """The result of `pipeline_gradients`.

    Attributes:
      loss: the sum of what all stages of all microbatches add to it, in float32 or wider.
      of_stages: the sum of what stages report.
      of_last: the sum of what `last` reports.
      gradients: of the loss, for (shared, layers), in float32 or wider.
      carried: what layers carry on after the last microbatch.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> found = frugax.parallel.Pipelined(jnp.ones(()), {}, {}, (jnp.zeros(2), jnp.ones(4)), {})
        >>> of_shared, of_layers = found.gradients
        >>> of_layers.shape
        (4,)
    """

    loss: Array
    of_stages: Any
    of_last: Any
    gradients: tuple[Any, Any]
    carried: Any


def pipeline_gradients(
    first: Callable[[Any, Any], Any],
    stage: Callable[[Any, Any, Any, Any, Any, Array], tuple[Any, Array, Any, Any]],
    last: Callable[[Any, Any, Any], tuple[Array, Any]],
    shared: Any,
    layers: Any,
    microbatches: Any,
    *,
    carried: Any = None,
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
      stage: (shared, its layers [L / (v P), ...], what they carry, x, microbatch, number) -> x, loss, report,
        what they carry on. The number, a traced int32, counts stages from 0 to v P - 1. The loss is what this
        stage adds, such as a balance loss of experts, or 0; a report is a tree of floating arrays that are
        summed, and get no gradient.
      last: (shared, x, microbatch) -> loss, report.
      shared: params that any of the three may read, the same on every rank. Their gradients are added up.
      layers: params of all layers in their order, L in front. With v chunks of layers for each of P ranks,
        stage number c P + r is chunk c of rank r. Placed over `axis_name` in their order, they need no
        message to get there where v is 1; else each step moves them, and their gradients, once.
      microbatches: trees of arrays, M in front, the same on every rank.
      carried: what layers carry from microbatch to microbatch, in the order of the schedule's forward passes,
        such as biases of routers: a tree with L in front, as `layers`. It gets no gradient. A backward pass
        reads what its forward pass read, which a device keeps for the microbatches in flight. None: nothing.
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
        >>> stage = lambda shared, layers, carried, x, rows, number: (
        ...     jnp.tanh(layers[0] * x), 0.0, {}, carried)
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
    carried = {} if carried is None else carried
    there = (mesh or jax.sharding.get_abstract_mesh()).shape
    if there.get(axis_name) != P:
        raise ValueError(
            f"schedule: got {P} devices; expected as many as the mesh {dict(there)} has of {axis_name!r}"
        )
    for x in jax.tree.leaves(microbatches):
        if x.shape[:1] != (M,):
            raise ValueError(f"microbatches: got {list(x.shape)}; expected {M} in front, as in the schedule")
    for name, tree in (("layers", layers), ("carried", carried)):
        for x in jax.tree.leaves(tree):
            if not x.ndim or x.shape[0] % (P * v):
                raise ValueError(
                    f"{name}: got {x.shape[0] if x.ndim else 'none'}; expected a multiple of {P * v} "
                    f"({P} stages times {v} chunks)"
                )
    by_rank = PartitionSpec(None, axis_name)
    cut = lambda x: x.reshape(v, P, x.shape[0] // (v * P), *x.shape[1:])  # noqa: E731
    whole = lambda y, x: y.reshape(x.shape)  # noqa: E731
    run = jax.shard_map(
        functools.partial(_run, first, stage, last, pipeline_slots(schedule), P, v, axis_name),
        mesh=mesh,
        in_specs=(PartitionSpec(), by_rank, by_rank, PartitionSpec()),
        out_specs=Pipelined(
            PartitionSpec(), PartitionSpec(), PartitionSpec(), (PartitionSpec(), by_rank), by_rank
        ),
        axis_names={axis_name},
        check_vma=False,  # zeros that stages make inside would each have to be typed as varying
    )
    found = run(shared, jax.tree.map(cut, layers), jax.tree.map(cut, carried), microbatches)
    of_shared, of_layers = found.gradients
    return found._replace(
        gradients=(of_shared, jax.tree.map(whole, of_layers, layers)),
        carried=jax.tree.map(whole, found.carried, carried),
    )


def _run(first, stage, last, slots, P, v, axis_name, shared, layers, carried, microbatches) -> Pipelined:
    """The program of one rank: layers and what they carry [v, 1, n, ...] are its own."""
    rank = jax.lax.axis_index(axis_name)
    ring = [(i, (i + 1) % P) for i in range(P)] if v > 1 else [(i, i + 1) for i in range(P - 1)]
    back = [(j, i) for i, j in ring]
    layers, carried = jax.tree.map(lambda x: x.squeeze(1), (layers, carried))
    shapes = jax.eval_shape(first, shared, _at(microbatches, 0))
    _, loss, of_stage, _ = jax.eval_shape(
        stage, shared, _at(layers, 0), _at(carried, 0), shapes, _at(microbatches, 0), rank
    )
    loss_last, of_last = jax.eval_shape(last, shared, shapes, _at(microbatches, 0))
    wide = jnp.result_type(loss, loss_last, jnp.float32)

    def read(task, inputs):
        """The microbatch, the stage's number, its layers and its input."""
        microbatch = _at(microbatches, task.microbatch)
        number = task.chunk * P + rank
        mine = _at(layers, task.chunk if v > 1 else 0)
        x = _at(inputs, task.reads)
        return microbatch, number, mine, _where(number == 0, first(shared, microbatch), x)

    def forward(task, inputs, carried, kept):
        microbatch, number, mine, x = read(task, inputs)
        before = _at(carried, task.chunk)
        x, _, _, after = stage(shared, mine, before, x, microbatch, number)
        inputs = _keep(inputs, jax.lax.ppermute(x, axis_name, ring), task.writes)
        carried = _keep(carried, after, jnp.where(task.active, task.chunk, -1))
        return inputs, carried, _keep(kept, before, task.carried)

    def backward(task, any_first, any_last, inputs, kept, gradients, sums):
        microbatch, number, mine, x = read(task, inputs)
        before = _at(kept, task.carried)
        is_first, is_last = task.active & (number == 0), task.active & (number == P * v - 1)
        of_shared, of_layers = sums.gradients

        def own(shared, mine, x):
            y, loss, report, _ = stage(shared, mine, before, x, microbatch, number)
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
        sums = Pipelined(
            sums.loss + loss + loss_last,
            _add(sums.of_stages, report),
            _add(sums.of_last, report_last),
            (of_shared, of_layers),
            None,
        )
        return _keep(gradients, jax.lax.ppermute(dx, axis_name, back), task.writes), sums

    def slot(carry, tables):
        inputs, carried, kept, gradients, sums = carry
        ahead, behind, any_ahead, any_behind, any_first, any_last = tables
        unchanged = lambda *arrays: arrays  # noqa: E731
        go_ahead = functools.partial(forward, ahead)
        inputs, carried, kept = jax.lax.cond(any_ahead, go_ahead, unchanged, inputs, carried, kept)
        go_back = functools.partial(backward, behind, any_first, any_last, inputs, kept)
        gradients, sums = jax.lax.cond(any_behind, go_back, unchanged, gradients, sums)
        return (inputs, carried, kept, gradients, sums), None

    def places(count, like):
        return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), like)

    widened = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), (shared, layers)
    )
    sums = Pipelined(jnp.zeros((), wide), _zeros(of_stage), _zeros(of_last), widened, None)
    f, b = slots.forward, slots.backward
    tables = jax.tree.map(lambda table: jnp.asarray(table)[:, rank], (f, b))
    is_first = b.active[:, 0] & (b.chunk[:, 0] == 0)
    is_last = b.active[:, -1] & (b.chunk[:, -1] == v - 1)
    # The same on every device, so that all take the same branch.
    common = tuple(jnp.asarray(x) for x in (f.active.any(1), b.active.any(1), is_first, is_last))
    kept = places(slots.carried_places, _at(carried, 0))  # what passes in flight read of it
    begin = places(slots.places, shapes), carried, kept, places(slots.gradient_places, shapes), sums
    (_, carried, _, _, sums), _ = jax.lax.scan(slot, begin, (*tables, *common))
    of_shared, of_layers = sums.gradients
    # These stay; the rest is added up over ranks.
    of_layers, carried = jax.tree.map(lambda x: x[:, None], (of_layers, carried))
    whole = jax.lax.psum((sums.loss, sums.of_stages, sums.of_last, of_shared), axis_name)
    return Pipelined(whole[0], whole[1], whole[2], (whole[3], of_layers), carried)


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
