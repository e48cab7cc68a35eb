"""Zeroth-order steps over many devices: replicas that exchange a scalar, or a byte, and stay the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int, Key, UInt8

from . import one_byte
from .directions import check_moves, displace, gaussian, loss_along
from .estimators import two_point
from .one_byte import Code
from .step import Rate, StepInfo, rate_of, taken


def distzo2_step(
    loss_fn: Callable[[Any, Any], Array],
    params: Any,
    batch: Any,
    key: Key[Array, ""],
    *,
    learning_rate: Rate,
    epsilon: float,
    mesh: Mesh,
    pert_axis: str | None = None,
    data_axis: str | None = None,
    count: int | Int[Array, ""] | None = None,
) -> tuple[Any, StepInfo]:
    """A MeZO step with the two passes on two devices, the batch split over others, or both.

    Parameters are replicated, devices make the same noise from the same key, and only scalars are summed.
    Where the slope is not finite no device steps. Blocks that stay in host memory go through `zo2_step`,
    which takes the same mesh.

    Args:
      loss_fn: (params, batch) -> the mean loss of the batch.
      params: on every device.
      batch: a tree whose leading axis `data_axis` splits evenly.
      key, learning_rate, epsilon, count: as in `mezo_step`.
      mesh: of devices.
      pert_axis: the mesh axis, of size 2, whose first device looks at +epsilon and whose second at
        -epsilon. None: each does both.
      data_axis: the mesh axis that splits the batch. None: all see all of it.

    Returns:
      New params and a `StepInfo`, the same on every device.

    Raises:
      ValueError: `pert_axis` is not of size 2; as `mezo_step`.

    Source: Wang et al. 2025, DistZO2 (arXiv 2507.03211).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> step = jax.jit(lambda w, x, key: frugax.optim.zeroth_order.distzo2_step(
        ...     lambda w, x: jnp.mean((x @ w) ** 2), w, x, key,
        ...     learning_rate=0.1, epsilon=1e-3, mesh=mesh, data_axis="data"))
        >>> w, info = step(jnp.ones(3), jnp.eye(3), jax.random.key(0))
        >>> round(float(info.loss), 3)
        1.0
    """
    check_sides(mesh, pert_axis)
    check_moves(params, key, gaussian)
    estimator = two_point(epsilon, in_place=False)
    rate = rate_of(learning_rate, count)

    def mean(x):
        return x if data_axis is None else lax.pmean(x, data_axis)

    def shard(params, batch, key, rate):
        if pert_axis is None:
            found = estimator(lambda p: loss_fn(p, batch), params, key, gaussian)
            loss, slope = mean(found.loss), mean(found.slope)
        else:
            side = 1.0 - 2.0 * lax.axis_index(pert_axis)
            here = mean(loss_along(lambda p: loss_fn(p, batch), params, key, side * epsilon))
            loss = lax.psum(here, pert_axis) / 2
            slope = lax.psum(side * here, pert_axis) / (2 * epsilon)
        info = taken(loss, slope, rate)
        return displace(params, key, info.scalar), info

    split, whole = PartitionSpec(data_axis), PartitionSpec()
    step = jax.shard_map(
        shard, mesh=mesh, in_specs=(whole, split, whole, whole), out_specs=whole, check_vma=False
    )
    return step(params, batch, key, jnp.asarray(rate, jnp.float32))


def check_sides(mesh: Mesh, pert_axis: str | None) -> None:
    """Raise where the axis of the two passes has another size than two."""
    if pert_axis is not None and mesh.shape[pert_axis] != 2:
        raise ValueError(f"pert_axis: got {pert_axis!r} of size {mesh.shape[pert_axis]}; expected size 2")


def one_byte_step(
    loss_fn: Callable[[Any, Any], Array],
    params: Any,
    batch: Any,
    key: Key[Array, ""],
    *,
    learning_rate: Rate,
    epsilon: float,
    limit: float,
    mesh: Mesh,
    axis: str,
    samples: int = 1,
    code: Code = "dynamic",
    count: int | Int[Array, ""] | None = None,
) -> tuple[Any, UInt8[Array, "gradients"]]:
    """Every worker finds slopes along directions of its own, sends a byte for each, and applies all of them.

    The step is the mean over the slopes that are finite. A slope that is not, because a loss was NaN or
    infinite, is sent as 255, which moves nothing and stands for nothing else.

    Args:
      loss_fn: (params, batch) -> the mean loss of a sample's share.
      params: on every worker.
      batch: a tree whose leading axis is split evenly over the workers, and each worker's part over samples.
      key: of the step; the direction of sample s of worker w is named by fold_in(key, w * samples + s).
      learning_rate, epsilon, count: as in `mezo_step`.
      limit: slopes are clipped to +-limit.
      mesh, axis: the workers.
      samples: directions, each with a share of the batch of its own, for a worker and step.
      code: "dynamic", 8-bit dynamic codes of slope / limit, or "log", the sign and the logarithm of
        |slope| / limit in eighths from e^-15.75 on, as the authors' code sends it in sixteenths.

    Returns:
      New params, bit for bit the same on every worker, and the bytes sent, samples of a worker side by side:
      with the keys they are a log that `replay_bytes` rebuilds the run from.

    Raises:
      ValueError: a worker's part is no multiple of `samples`; `code` is unknown; as `mezo_step`.

    Source: Zelikman et al. 2023, Just One Byte (per gradient) (arXiv 2306.10015), and its code.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> step = jax.jit(lambda w, x, key: frugax.optim.zeroth_order.one_byte_step(
        ...     lambda w, x: jnp.mean((x @ w) ** 2), w, x, key,
        ...     learning_rate=0.1, epsilon=1e-3, limit=10.0, mesh=mesh, axis="worker"))
        >>> w, sent = step(jnp.ones(3), jnp.eye(3), jax.random.key(0))
        >>> sent.nbytes
        1
    """
    check_moves(params, key, gaussian)
    encode, _ = one_byte.code_named(code)
    estimator = two_point(epsilon, in_place=False)
    parts = samples * mesh.shape[axis]
    for x in jax.tree.leaves(batch):
        if samples < 1 or x.shape[0] % parts:
            raise ValueError(
                f"samples: got {samples} for {x.shape[0]} rows of a batch over {mesh.shape[axis]} workers; "
                "expected equal parts"
            )

    def shard(params, batch, key, rate):
        first = lax.axis_index(axis) * samples
        shares = jax.tree.map(lambda x: x.reshape(samples, -1, *x.shape[1:]), batch)

        def sample(turn):
            number, share = turn
            own = jax.random.fold_in(key, number)
            return estimator(lambda p: loss_fn(p, share), params, own, gaussian).slope

        sent = encode(lax.map(sample, (first + jnp.arange(samples), shares)) / limit)
        codes = lax.all_gather(sent, axis, tiled=True)
        return _apply(params, key, codes, rate, limit, code), codes

    split, whole = PartitionSpec(axis), PartitionSpec()
    step = jax.shard_map(
        shard, mesh=mesh, in_specs=(whole, split, whole, whole), out_specs=whole, check_vma=False
    )
    return step(params, batch, key, jnp.asarray(rate_of(learning_rate, count), jnp.float32))


def replay_bytes(
    params: Any,
    keys: Key[Array, "steps"],
    codes: UInt8[Array, "steps gradients"],
    *,
    learning_rate: float | Float[Array, "steps"],
    limit: float,
    code: Code = "dynamic",
) -> Any:
    """Rebuild the parameters after a logged run of `one_byte_step`, as a worker that joins late does.

    Args:
      params: those that the run began with.
      keys, codes: of its steps, in order.
      learning_rate: of the run, or of each step.
      limit, code: of the run.

    Source: Zelikman et al. 2023 (arXiv 2306.10015).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> keys, codes = jax.random.split(jax.random.key(0), 5), jnp.full((5, 2), 200, jnp.uint8)
        >>> zo = frugax.optim.zeroth_order
        >>> zo.replay_bytes(jnp.zeros(3), keys, codes, learning_rate=0.1, limit=1.0).shape
        (3,)
    """

    def step(params, log):
        key, sent, rate = log
        return _apply(params, key, sent, rate, limit, code), None

    rates = jnp.broadcast_to(jnp.asarray(learning_rate, jnp.float32), len(keys))
    return lax.scan(step, params, (keys, codes, rates))[0]


def _apply(params, key, codes: UInt8[Array, "n"], rate, limit: float, code: Code):
    """Every sample's step, in the order of workers: the same sums in the same order everywhere."""
    _, decode = one_byte.code_named(code)
    slopes: Float[Array, "n"] = decode(codes) * limit
    finite = jnp.maximum(jnp.sum(codes != one_byte.NOT_FINITE), 1)

    def step(params, number):
        scalar = -rate * slopes[number] / finite
        return displace(params, jax.random.fold_in(key, number), scalar), None

    return lax.scan(step, params, jnp.arange(len(codes)))[0]
