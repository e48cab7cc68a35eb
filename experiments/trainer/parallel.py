"""Layouts of a training step over devices: `jit` over a mesh, or `pmap`. Both give the same losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

AXIS = "data"


class Layout(NamedTuple):
    """Places of the state and the batches on devices, and the compilation of a step for them."""

    axis_name: str | None  # what `make_train_step` reduces over
    devices: int
    create: Callable[[Callable[[], Any]], Any]  # init function -> the state it makes, on the devices
    abstract: Callable[[Callable[[], Any]], Any]  # init function -> shapes and shardings, for `put`
    put: Callable[[Any], Any]  # a restored state -> the form the step takes
    take: Callable[[Any], Any]  # the form the step takes -> one copy, for checkpoints and evaluation
    batch: Callable[[Any], Any]  # this process's rows (numpy) -> the global batch
    compile: Callable[[Callable, Any, Any], Callable]  # (step, state, batch) -> a compiled step


def make_layout(config: ConfigDict) -> Layout:
    """The layout that `config.parallel` ("jit" or "pmap") and `config.mesh` name.

    Raises:
      ValueError: the devices don't divide the batch, or there are not enough of them.
    """
    devices = jax.devices()
    wanted = config.mesh.data if config.mesh.data != -1 else len(devices)
    if not 1 <= wanted <= len(devices) or (wanted != len(devices) and jax.process_count() > 1):
        raise ValueError(
            f"mesh.data: got {config.mesh.data}; expected 1 to {len(devices)} devices, or -1 for all"
        )
    if config.batch_size % (wanted * config.accumulate):
        raise ValueError(
            f"batch_size: got {config.batch_size}; expected a multiple of {wanted * config.accumulate} "
            f"({wanted} devices times accumulate={config.accumulate})"
        )
    if config.parallel == "jit":
        return _jit_over_mesh(devices[:wanted])
    if config.parallel == "pmap":
        if jax.process_count() > 1:
            raise ValueError("parallel: got 'pmap'; expected 'jit' for several processes")
        return _pmap(devices[:wanted])
    raise ValueError(f"parallel: got {config.parallel!r}; expected 'jit' or 'pmap'")


def _jit_over_mesh(devices) -> Layout:
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec(AXIS))

    def abstract(init):
        shapes = jax.eval_shape(init)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)

    def compile_step(step, state, batch):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere))
        return jitted.lower(state, batch).compile()

    return Layout(
        axis_name=None,
        devices=len(devices),
        create=lambda init: jax.jit(init, out_shardings=everywhere)(),
        abstract=abstract,
        put=lambda state: state,
        take=lambda state: state,
        batch=lambda rows: {k: jax.make_array_from_process_local_data(by_row, v) for k, v in rows.items()},
        compile=compile_step,
    )


def _pmap(devices) -> Layout:
    n = len(devices)
    one = jax.sharding.SingleDeviceSharding(devices[0])

    def put(state):
        return jax.pmap(lambda x, _: x, in_axes=(None, 0), devices=devices)(state, np.zeros(n))

    def abstract(init):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), jax.eval_shape(init)
        )

    def compile_step(step, state, batch):
        def on_each(state, batch):
            state, metrics = step(state, batch)
            return state, metrics

        mapped = jax.pmap(on_each, axis_name=AXIS, devices=devices, donate_argnums=0)
        compiled = mapped.lower(state, batch).compile()

        def run(state, batch):
            state, metrics = compiled(state, batch)
            return state, jax.tree.map(lambda x: x[0], metrics)

        return run

    return Layout(
        axis_name=AXIS,
        devices=n,
        create=lambda init: put(jax.jit(init)()),
        abstract=abstract,
        put=put,
        take=lambda state: jax.tree.map(lambda x: x[0], state),
        # Row r goes where jit's mesh puts it: the first rows to the first device.
        batch=lambda rows: {k: v.reshape(n, -1, *v.shape[1:]) for k, v in rows.items()},
        compile=compile_step,
    )
