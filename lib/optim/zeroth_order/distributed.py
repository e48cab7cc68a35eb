"""Zeroth-order steps over many devices: replicas that exchange a scalar, or a byte, and stay the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Key, UInt8

from ...formats import dynamic8
from .directions import displace, gaussian
from .estimators import two_point
from .step import StepInfo


def distzo2_step(
    loss_fn: Callable[[Any, Any], Array],
    params: Any,
    batch: Any,
    key: Key[Array, ""],
    *,
    learning_rate: float | Array,
    epsilon: float,
    mesh: Mesh,
    pert_axis: str | None = None,
    data_axis: str | None = None,
) -> tuple[Any, StepInfo]:
    """A MeZO step with the two passes on two devices, the batch split over others, or both.

    Parameters are replicated, devices make the same noise from the same key, and only scalars are summed.

    Args:
      loss_fn: (params, batch) -> the mean loss of the batch.
      params: on every device.
      batch: a tree whose leading axis `data_axis` splits evenly.
      key, learning_rate, epsilon: as in `mezo_step`.
      mesh: of devices.
      pert_axis: the mesh axis, of size 2, whose first device looks at +epsilon and whose second at
        -epsilon. None: each does both.
      data_axis: the mesh axis that splits the batch. None: all see all of it.

    Returns:
      New params and a `StepInfo`, the same on every device.

    Source: Wang et al. 2025, DistZO2 (arXiv 2507.03211). Its sliced upload of offloaded blocks is not here.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> w, info = frugax.optim.zeroth_order.distzo2_step(
        ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), jnp.eye(3), jax.random.key(0),
        ...     learning_rate=0.1, epsilon=1e-3, mesh=mesh, data_axis="data")
        >>> round(float(info.loss), 3)
        1.0
    """
    if pert_axis is not None and mesh.shape[pert_axis] != 2:
        raise ValueError(f"pert_axis: got {pert_axis!r} of size {mesh.shape[pert_axis]}; expected size 2")
    estimator = two_point(epsilon, in_place=False)

    def mean(x):
        return x if data_axis is None else lax.pmean(x, data_axis)

    def shard(params, batch, key):
        if pert_axis is None:
            found = estimator(lambda p: loss_fn(p, batch), params, key, gaussian)
            loss, slope = mean(found.loss), mean(found.slope)
        else:
            side = 1.0 - 2.0 * lax.axis_index(pert_axis)
            here = mean(loss_fn(displace(params, key, side * epsilon), batch))
            loss = lax.psum(here, pert_axis) / 2
            slope = lax.psum(side * here, pert_axis) / (2 * epsilon)
        scalar = -learning_rate * slope
        return displace(params, key, scalar), StepInfo(loss, slope, scalar)

    split = PartitionSpec(data_axis)
    whole = PartitionSpec()
    return jax.shard_map(shard, mesh=mesh, in_specs=(whole, split, whole), out_specs=whole)(
        params, batch, key
    )


def one_byte_step(
    loss_fn: Callable[[Any, Any], Array],
    params: Any,
    batch: Any,
    key: Key[Array, ""],
    *,
    learning_rate: float | Array,
    epsilon: float,
    limit: float,
    mesh: Mesh,
    axis: str,
) -> tuple[Any, UInt8[Array, "workers"]]:
    """Every worker finds the slope along a direction of its own, sends one byte, and applies all of them.

    Args:
      loss_fn: (params, batch) -> the mean loss of a worker's share.
      params: on every worker.
      batch: a tree whose leading axis is split evenly over the workers.
      key: of the step; worker w's direction is named by fold_in(key, w).
      learning_rate, epsilon: as in `mezo_step`; the step is the mean of the workers'.
      limit: slopes are clipped to +-limit and sent as 8-bit dynamic codes of slope / limit.
      mesh, axis: the workers.

    Returns:
      New params, bit for bit the same on every worker, and the bytes sent: with the keys they are a log that
      `replay_bytes` rebuilds the run from.

    Source: Zelikman et al. 2023, Just One Byte (per gradient) (arXiv 2306.10015).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> w, sent = frugax.optim.zeroth_order.one_byte_step(
        ...     lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), jnp.eye(3), jax.random.key(0),
        ...     learning_rate=0.1, epsilon=1e-3, limit=10.0, mesh=mesh, axis="worker")
        >>> sent.nbytes
        1
    """
    estimator = two_point(epsilon, in_place=False)

    def shard(params, batch, key):
        own = jax.random.fold_in(key, lax.axis_index(axis))
        slope = estimator(lambda p: loss_fn(p, batch), params, own, gaussian).slope
        sent = dynamic8.encode(jnp.clip(slope / limit, -1, 1)).astype(jnp.uint8)
        codes = lax.all_gather(sent, axis)
        return _apply(params, key, codes, learning_rate, limit), codes

    split, whole = PartitionSpec(axis), PartitionSpec()
    step = jax.shard_map(shard, mesh=mesh, in_specs=(whole, split, whole), out_specs=whole, check_vma=False)
    return step(params, batch, key)


def replay_bytes(
    params: Any,
    keys: Key[Array, "steps"],
    codes: UInt8[Array, "steps workers"],
    *,
    learning_rate: float | Array,
    limit: float,
) -> Any:
    """Rebuild the parameters after a logged run of `one_byte_step`, as a worker that joins late does.

    Args:
      params: those that the run began with.
      keys, codes: of its steps, in order.
      learning_rate, limit: of the run.

    Source: Zelikman et al. 2023 (arXiv 2306.10015).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> keys, codes = jax.random.split(jax.random.key(0), 5), jnp.full((5, 2), 200, jnp.uint8)
        >>> zo = frugax.optim.zeroth_order
        >>> zo.replay_bytes(jnp.zeros(3), keys, codes, learning_rate=0.1, limit=1.0).shape
        (3,)
    """

    def step(params, log):
        return _apply(params, *log, learning_rate, limit), None

    return lax.scan(step, params, (keys, codes))[0]


def _apply(params, key, codes: UInt8[Array, "w"], learning_rate, limit: float):
    """Every worker's step, in the order of workers: the same sums in the same order everywhere."""
    slopes: Float[Array, "w"] = dynamic8.decode(codes.astype(jnp.int32)) * limit

    def step(params, worker):
        scalar = -learning_rate * slopes[worker] / len(codes)
        return displace(params, jax.random.fold_in(key, worker), scalar), None

    return lax.scan(step, params, jnp.arange(len(codes)))[0]
