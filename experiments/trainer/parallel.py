"""Layouts of a training step over devices: `jit` over a mesh, or `pmap`. Both give the same losses."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.trainer.state import TrainState
from frugax.parallel import AXES, BATCH_AXES, make_mesh, shardings, state_shardings, tensor_messages

AXIS = "data"  # of pmap
COPIES = ("slice", "data")  # of a mesh: devices that share the rows of a batch and nothing else


class Layout(NamedTuple):
    """Places of the state and the batches on devices, and the compilation of a step for them."""

    axis_name: str | tuple[str, ...] | None  # what `make_train_step` reduces over
    devices: int
    rows: tuple[int, ...]  # of each batch: those that this process reads
    create: Callable[[Callable[[], Any]], Any]  # init function -> the state it makes, on the devices
    abstract: Callable[[Callable[[], Any]], Any]  # init function -> shapes and shardings, for `put`
    put: Callable[[Any], Any]  # a restored state -> the form the step takes
    take: Callable[[Any], Any]  # the form the step takes -> the arrays of one model, for checkpoints
    whole: Callable[[Any], Any]  # arrays of one model -> this process's own copy; all processes must call it
    place_grads: Callable[[Any], Any]  # gradients -> the same, where ZeRO's stage has them, inside the step
    batch: Callable[[Any], Any]  # `rows` of a batch (numpy) -> the global batch
    abstract_batch: Callable[[Any], Any]  # shapes of the global batch -> the same with shardings
    compile: Callable[..., Any]  # (step, state, batch, options of the compiler=None) -> a compiled step


def make_layout(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The layout that `config.parallel` ("jit" or "pmap") and `config.mesh` name.

    Args:
      config: of a run.
      devices: to lay out; None takes all there are. Devices of a topology serve for compiling.

    Raises:
      ValueError: the devices don't divide the batch, or there are not enough of them; or an array can't be
        cut as the mesh says (from `create` and `abstract`).
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: config.mesh[name] for name in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    said = ", ".join(f"mesh.{name}: got {size}" for name, size in sizes.items() if size != 1)
    if -1 in sizes.values():
        wanted = len(devices)
        if len(devices) % given:
            raise ValueError(f"{said}; expected sizes that divide {len(devices)} devices beside -1")
    else:
        wanted = given
        if wanted > len(devices) or (wanted != len(devices) and jax.process_count() > 1):
            raise ValueError(f"{said}; expected sizes that multiply to at most {len(devices)} devices, or -1")
    mesh = make_mesh(**sizes, devices=devices[:wanted])
    rows = math.prod(mesh.shape[name] for name in BATCH_AXES)
    if config.batch_size % (rows * config.accumulate):
        raise ValueError(
            f"batch_size: got {config.batch_size}; expected a multiple of {rows * config.accumulate} "
            f"({rows} devices times accumulate={config.accumulate})"
        )
    if config.data.sequence_length % mesh.shape["sequence"]:
        raise ValueError(
            f"data.sequence_length: got {config.data.sequence_length}; expected a multiple of "
            f"mesh.sequence={mesh.shape['sequence']}"
        )
    if config.parallel == "jit":
        how = {"joined": _joins(config, mesh), "messages": config.mesh.tensor_messages}
        return _jit_over_mesh(mesh, config.mesh.zero, config.batch_size, **how)
    if config.parallel == "pmap":
        if jax.process_count() > 1:
            raise ValueError("parallel: got 'pmap'; expected 'jit' for several processes")
        if config.mesh.tensor_messages != "sums":
            got = f"mesh.tensor_messages: got {config.mesh.tensor_messages!r}"
            raise ValueError(f"{got} with parallel='pmap'; expected 'sums'")
        if rows != wanted or mesh.shape["fsdp"] > 1:
            raise ValueError(
                "parallel: got 'pmap'; expected 'jit' for mesh.fsdp, pipeline, sequence or tensor above 1"
            )
        return _pmap(devices[:wanted], config.batch_size)
    raise ValueError(f"parallel: got {config.parallel!r}; expected 'jit' or 'pmap'")


def _joins(config: ConfigDict, mesh: jax.sharding.Mesh) -> bool:
    """True where each device is to compute its rows by itself, and send all gradients as one message.

    Between processes on CPU each array is a message of its own, and dozens take longer than a step. Elsewhere
    the compiler sends gradients while it computes others. Devices by themselves have the same numbers only
    where no layer compares rows, or draws random numbers for them.
    """
    several = jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu"
    copies = all(size == 1 for name, size in mesh.shape.items() if name not in COPIES)
    apart = not config.model.low_bit and all(b.channel != "MoE" for b in config.model.blocks.values())
    return several and copies and apart


def _jit_over_mesh(
    mesh: jax.sharding.Mesh, zero: int, batch_size: int, *, joined: bool, messages: str
) -> Layout:
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    by_row_and_time = NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))

    def places(state: TrainState) -> TrainState:
        """Place each array of a state: ZeRO's stage 1 shares the optimizer's, 3 the params too."""
        of_params = shardings(state.params, mesh, zero=zero >= 3)
        apart = shardings(state.params, mesh, zero=zero >= 1)
        return jax.tree.map(lambda _: everywhere, state)._replace(
            params=of_params,
            optimizer=state_shardings(state.optimizer, state.params, mesh, zero=zero >= 1),
            ema=None if state.ema is None else apart,
        )

    def abstract(init):
        shapes = jax.eval_shape(init)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places(shapes)
        )

    def compile_step(step, state, batch, options=None):
        out = jax.tree.map(lambda x: x.sharding, state), everywhere
        if joined:
            by_copy = PartitionSpec(COPIES)
            step = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(PartitionSpec(), by_copy),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        with jax.set_mesh(mesh), tensor_messages(messages):  # layers find their axes by themselves
            return jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch).compile(options)

    # Not a part by this process's number: devices of several may share rows, or lie in another order.
    indices = by_row.addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({row for index in indices if index for row in range(batch_size)[index[0]]})

    def batch_sharding(x):
        return by_row_and_time if len(x.shape) > 1 else by_row

    def place_batch(batch):
        def place(x):
            def read(index):
                here = range(batch_size)[index[0]]
                first = rows.index(here.start)
                return x[(slice(first, first + len(here)), *index[1:])]

            return jax.make_array_from_callback((batch_size, *x.shape[1:]), batch_sharding(x), read)

        return jax.tree.map(place, dict(batch))

    gather = jax.jit(lambda tree: tree, out_shardings=everywhere)
    return Layout(
        axis_name=COPIES if joined else None,
        devices=mesh.size,
        rows=tuple(rows),
        create=lambda init: jax.jit(init, out_shardings=places(jax.eval_shape(init)))(),
        abstract=abstract,
        put=lambda state: state,
        take=lambda state: state,
        whole=lambda tree: jax.tree.map(lambda x: x.addressable_data(0), gather(tree)),
        place_grads=lambda grads: (
            grads
            if joined
            else jax.lax.with_sharding_constraint(grads, shardings(grads, mesh, zero=zero >= 2))
        ),
        batch=place_batch,
        abstract_batch=lambda batch: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(x)), batch
        ),
        compile=compile_step,
    )


def _pmap(devices, batch_size: int) -> Layout:
    n = len(devices)
    one = jax.sharding.SingleDeviceSharding(devices[0])

    def put(state):
        return jax.pmap(lambda x, _: x, in_axes=(None, 0), devices=devices)(state, np.zeros(n))

    def abstract(init):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), jax.eval_shape(init)
        )

    def compile_step(step, state, batch, options=None):
        def on_each(state, batch):
            state, metrics = step(state, batch)
            return state, metrics

        mapped = jax.pmap(on_each, axis_name=AXIS, devices=devices, donate_argnums=0)
        compiled = mapped.lower(state, batch).compile(options)

        def run(state, batch):
            state, metrics = compiled(state, batch)
            return state, jax.tree.map(lambda x: x[0], metrics)

        return run

    return Layout(
        axis_name=AXIS,
        devices=n,
        rows=tuple(range(batch_size)),
        create=lambda init: put(jax.jit(init)()),
        abstract=abstract,
        put=put,
        take=lambda state: jax.tree.map(lambda x: x[0], state),
        whole=lambda tree: jax.tree.map(lambda x: x.addressable_data(0), tree),
        place_grads=lambda grads: grads,
        # Row r goes where jit's mesh puts it: the first rows to the first device.
        batch=lambda rows: {k: v.reshape(n, -1, *v.shape[1:]) for k, v in rows.items()},
        abstract_batch=lambda batch: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((n, x.shape[0] // n, *x.shape[1:]), x.dtype), batch
        ),
        compile=compile_step,
    )
