"""Systems of devices by name, to compile for without having them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ..kernels.common.chips import DEVICES, Device, target_config

# libtpu must neither look for chips nor for other processes that hold them. Read when it is first loaded.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
EXAMPLES = {
    "v5e": "v5e:16x16",
    "v5p": "v5p:8x8x8",
    "v6e": "v6e:16x16",
    "tpu7x": "tpu7x:4x4x4",
    "h100": "h100:8",
    "h200": "h200:8",
    "cpu": "cpu:8",
}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for, and what they are.

    Attributes:
      name: as `topology` was given it.
      platform: "tpu", "cuda" or "cpu".
      chip: peaks and bandwidths of one device; None for CPUs, which have no data sheet here.
      slices: groups of devices with slow links between: slices of TPUs, hosts of GPUs.
      devices: abstract devices, for a mesh; all of the first slice come first.

    Example:
        >>> import frugax
        >>> system = frugax.planner.topology("cpu:1")
        >>> isinstance(system, frugax.planner.Topology), system.slices, len(system.devices)
        (True, 1, 1)
    """

    name: str
    platform: str
    chip: Device | None
    slices: int
    devices: tuple[Any, ...] = field(repr=False, compare=False)

    def sending(self, mesh: Mesh, axes: Sequence[str], *, neighbors: bool = False) -> float:
        """The bytes a second that a device can send to the others along axes of a mesh.

        On a torus, a device sends over both links of each dimension along which those devices lie, over one
        where the dimension is a line and no ring. To one neighbor it sends over one link. Where slices or
        hosts lie between, it sends over the network alone.

        Args:
          mesh: made of these devices.
          axes: names of its axes.
          neighbors: True for a permutation, which sends to one device.

        Raises:
          ValueError: the devices have no data sheet (CPUs).
        """
        if self.chip is None:
            raise ValueError(
                f"topology: got {self.name}; expected chips of {', '.join(DEVICES)}, to tell times"
            )
        group = self._group(mesh, axes)
        places = {device.id: i for i, device in enumerate(self.devices)}
        per_slice = len(self.devices) // self.slices
        if len({places[d.id] // per_slice for d in group}) > 1:
            return self.chip.network
        if self.platform != "tpu":
            return 2 * self.chip.link
        if neighbors:
            return self.chip.link
        # Two cores of a chip have the same coordinates and share its links.
        coords = np.array([d.coords for d in group])
        sizes: list[int] = list(np.ptp([d.coords for d in self.devices[:per_slice]], axis=0) + 1)
        rings = [
            size % self.chip.closes == 0 and len(set(x)) == size
            for size, x in zip(sizes, coords.T, strict=True)
        ]
        links = sum(1 + int(ring) for ring, along in zip(rings, coords.T, strict=True) if np.ptp(along))
        return max(links, 1) * self.chip.link

    def _group(self, mesh: Mesh, axes: Sequence[str]) -> list[Any]:
        first = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
        return list(np.ravel(mesh.devices[first]))


def topology(name: str) -> Topology:
    """The system that a name says, without starting a device.

    Args:
      name: "v5e:16x16", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4": a TPU and the shape of a slice; "h100:8",
        "h200:8": GPUs of one host; "*2" behind it for two slices or hosts ("v5p:8x8x8*2"). "cpu:8": the first
        CPU devices of this process, which `--xla_force_host_platform_device_count=8` in XLA_FLAGS makes.

    Returns:
      A `Topology`.

    Raises:
      ValueError: the name is none that the compiler knows; it lists those.

    Example:
        >>> import frugax
        >>> frugax.planner.topology("cpu:1").platform
        'cpu'
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not found or found[1] not in EXAMPLES or "0" in re.findall(r"\d+", name.partition(":")[2]):
        known = ", ".join(EXAMPLES.values())
        raise ValueError(
            f"topology: got {name!r}; expected such as {known}, or with '*2' two slices or hosts"
        )
    chip, shape, slices = found[1], found[2], int(found[3] or 1)
    if chip == "cpu":
        devices = _cpu_devices(name, shape, slices)
        return Topology(name, "cpu", None, slices, devices)
    if chip in ("h100", "h200"):
        return Topology(name, "cuda", DEVICES[chip], slices, _gpus(name, chip, shape, slices))
    return Topology(name, "tpu", DEVICES[chip], slices, _tpus(name, f"{chip}:{shape}", slices))


def _tpus(name: str, shape: str, slices: int) -> tuple[Any, ...]:
    from jax.experimental import topologies

    for key, value in _LIBTPU.items():
        os.environ.setdefault(key, value)
    try:
        more = {"num_slices": slices} if slices > 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **more).devices
    except Exception as error:  # jax raises whatever libtpu said, or that there is no libtpu
        chips = ", ".join(x for x in EXAMPLES.values() if not x.startswith(("h", "cpu")))
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"topology: got {name!r}; expected a slice that libtpu knows ({chips}): {said}"
        ) from error
    return tuple(sorted(found, key=lambda d: getattr(d, "slice_index", None) or 0))


def _gpus(name: str, chip: str, shape: str, hosts: int) -> tuple[Any, ...]:
    from jax.experimental import topologies

    if "x" in shape:
        raise ValueError(f"topology: got {name!r}; expected the GPUs of a host, and hosts: 'h100:8*2'")
    try:
        return tuple(
            topologies.get_topology_desc(
                platform="cuda", topology=f"1x{hosts}x{shape}", target_config=target_config(chip)
            ).devices
        )
    except Exception as error:  # jax raises whatever its plugin loader met
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"topology: got {name!r}; expected jax-cuda13-plugin to be installed: {said}"
        ) from error


def _cpu_devices(name: str, shape: str, slices: int) -> tuple[Any, ...]:
    import jax

    count = int(np.prod([int(n) for n in shape.split("x")])) * slices
    devices = jax.devices("cpu")
    if count > len(devices):
        raise ValueError(
            f"topology: got {name!r}; expected at most {len(devices)} devices, or XLA_FLAGS="
            f"--xla_force_host_platform_device_count={count} before Python starts"
        )
    return tuple(devices[:count])
