"""A mesh of devices by the kinds of parallelism."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest: neighbours on the last axis are neighbours on the chip's network.
AXES = ("slice", "pipeline", "data", "fsdp", "expert", "sequence", "tensor")
BATCH_AXES = ("slice", "data", "fsdp", "expert")  # rows of a batch are spread over these


def make_mesh(
    *,
    slice: int = 1,
    pipeline: int = 1,
    data: int = -1,
    fsdp: int = 1,
    expert: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Lay devices out by the kinds of parallelism; every axis is there, most of size 1.

    Args:
      slice: TPU slices, or other groups of devices with slow links between; they hold copies of the model.
      pipeline: stages of layers.
      data: copies of the model that read other rows of a batch.
      fsdp: devices that share a copy of the params, or of what `zero` of `shardings` says.
      expert: devices that share the experts of mixture-of-experts layers, and otherwise the rows of a batch.
      sequence: devices that share the time axis.
      tensor: devices that share each matrix.
      devices: which; None takes all. At most one size is -1: all devices that the others leave.

    Returns:
      A mesh with the axes "slice", "pipeline", "data", "fsdp", "expert", "sequence" and "tensor".

    Raises:
      ValueError: a size is below 1, or sizes don't multiply to the number of devices.

    Example:
        >>> import frugax
        >>> mesh = frugax.parallel.make_mesh(fsdp=-1, data=1)
        >>> mesh.shape["tensor"], mesh.size == len(mesh.devices.ravel())
        (1, True)
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (slice, pipeline, data, fsdp, expert, sequence, tensor), strict=True))
    free = [name for name, size in sizes.items() if size == -1]
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"{name}: got {size}; expected a number of devices, or -1 for all that are left")
    if len(free) > 1:
        raise ValueError(f"{free[1]}: got -1 beside {free[0]}=-1; expected -1 at most once")
    given = math.prod(size for size in sizes.values() if size != -1)
    said = " * ".join(f"{name}={size}" for name, size in sizes.items() if size not in (1, -1)) or "1"
    if free:
        if len(devices) % given:
            raise ValueError(
                f"{free[0]}: got -1 with {said}; expected sizes that divide {len(devices)} devices"
            )
        sizes[free[0]] = len(devices) // given
    elif given != len(devices):
        raise ValueError(
            f"mesh: got {said} = {given}; expected sizes that multiply to {len(devices)} devices"
        )
    shape = tuple(sizes.values())
    return Mesh(_arranged(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    if shape[0] > 1:
        outer = (shape[0],) + (1,) * (len(shape) - 1)
        return mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), outer, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
