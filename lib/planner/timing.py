"""The time of a compiled program by a simple model: the compiler's estimates, a roofline, and links."""

import re
from functools import partial
from typing import NamedTuple

from jax.sharding import Mesh

from . import hlo
from .flops import Flops
from .program import Computation, Instruction, Program, config_of, nbytes
from .topology import Topology
from .visits import visits

# Names of arrays, or of what other instructions do.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "replica-id", "opt-barrier", "optimization-barrier", "domain", "broadcast",
}  # fmt: skip
_KERNELS = ("tpu_custom_call", "mosaic_gpu")


class Times(NamedTuple):
    """Seconds of one run of a program on each device.

    Attributes:
      compiler: by the compiler's own estimates of cycles (TPU programs have them), over the clock.
      roofline: of other instructions: the larger of products over peak and bytes over the bandwidth of HBM.
      kernels: of Pallas kernels, of which the compiler knows nothing: their products over peak, or the bytes
        that they read and write over the bandwidth, whichever is more in all.
      exposed: of communication that no computation hides.
      hidden: of communication beside computation.
    """

    compiler: float
    roofline: float
    kernels: float
    exposed: float
    hidden: float

    @property
    def step(self) -> float:
        """All that does not run beside another."""
        return self.compiler + self.roofline + self.kernels + self.exposed


def times(program: Program, mesh: Mesh, topology: Topology, kernel_flops: Flops | None = None) -> Times:
    """Estimate the seconds of a program.

    The model: instructions run one after the other, as scheduled. A collective takes its bytes on the wire
    over what a device can send along its axes (`Topology.sending`), with no latency. A collective that starts
    at one place of the schedule and ends at another runs beside what is between; what is longer than that is
    exposed. All other communication is exposed. Copies that are started early count nothing.

    Args:
      program: `parse` of its text.
      mesh: the mesh that it was compiled for.
      topology: the devices of the mesh.
      kernel_flops: `flops` of the program, for its kernels; on all devices together.

    Raises:
      ValueError: the topology is of CPUs.
    """
    sizes, chip = dict(mesh.shape), topology.chip
    compiler = roofline = kernel_bytes = exposed = hidden = 0.0
    speeds: dict[tuple[tuple[str, ...], bool], float] = {}

    def sending(axes: tuple[str, ...], neighbors: bool) -> float:
        if (axes, neighbors) not in speeds:
            speeds[axes, neighbors] = topology.sending(mesh, axes, neighbors=neighbors)
        return speeds[axes, neighbors]

    sending((), False)  # says that CPUs have no times
    for visit in visits(program):
        now = 0.0
        started: dict[str, tuple[float, float]] = {}  # collectives under way: when they began, their seconds
        for x in visit.computation.instructions.values():
            talks = hlo.collectives_of(program, visit, x, sizes)
            for key in _ends(program, visit.computation, x):
                if key in started:
                    began, seconds = started.pop(key)
                    wait = max(seconds - (now - began), 0)
                    exposed += wait * visit.times
                    hidden += (seconds - wait) * visit.times
                    now += wait
            for key, one in talks:
                seconds = one.wire_bytes / sending(one.axes, one.kind == "collective-permute")
                if one.asynchronous:
                    started[key] = now, seconds
                else:
                    exposed += seconds * visit.times
            if talks and x.opcode != "fusion":
                continue
            cycles = _cycles(x)
            if cycles is not None:
                seconds = cycles / chip.clock
                compiler += seconds * visit.times
            elif any(f'custom_call_target="{name}' in x.attributes for name in _KERNELS):
                read = _bytes(program, visit.computation, x)
                kernel_bytes += read * visit.times
                seconds = read / chip.bandwidth
            elif x.opcode in _FREE or x.opcode.endswith(("-start", "-done")) or talks or _moves_nothing(x):
                seconds = 0.0
            else:
                bytes_, products = (
                    _bytes(program, visit.computation, x),
                    _products(program, visit.computation, x),
                )
                seconds = max(bytes_ / chip.bandwidth, products / chip.peak)
                roofline += seconds * visit.times
            now += seconds
        exposed += sum(seconds for _, seconds in started.values()) * visit.times
    computed = kernel_flops.kernels / mesh.size / chip.peak if kernel_flops else 0.0
    kernels = max(computed, kernel_bytes / chip.bandwidth)
    return Times(compiler, roofline, kernels, exposed, hidden)


def _cycles(x: Instruction) -> int | None:
    """The compiler's estimate, where it gives one."""
    if '"estimated_cycles"' not in x.attributes:  # most of a GPU's instructions have long notes without
        return None
    return int(config_of(x).get("window_config", {}).get("estimated_cycles", 0))


def _ends(program: Program, computation: Computation, x: Instruction) -> list[str]:
    """The keys of collectives that an instruction waits for."""
    if x.opcode.endswith("-done"):
        return list(x.operands[:1])
    if x.opcode == "fusion":
        for name in x.called("calls"):
            fused = program.computations[name].instructions.values()
            if any('"AsyncCollectiveDone"' in y.attributes for y in fused):
                return [key for y in fused if (key := hlo.chain(y))]
    return []


def _moves_nothing(x: Instruction) -> bool:
    return x.opcode == "custom-call" and "S(1)" in x.shape


def _bytes(program: Program, computation: Computation, x: Instruction) -> int:
    """Bytes of HBM that an instruction reads and writes; a TPU's arrays in VMEM, S(1), are not among them.

    Of an array that it slices, or updates in its place, the slice counts: loops keep an array of all trips.
    """
    if x.opcode == "fusion" and (called := x.called("calls")):
        inside = program.computations[called[0]]
        parameters = {int(y.literal): y for y in inside.instructions.values() if y.opcode == "parameter"}
        operands = computation.operands(x)
        read = [_read(inside, parameters[i], y.shape) for i, y in enumerate(operands) if i in parameters]
        root = inside.instructions[inside.root]
        parts = inside.operands(root) if root.opcode == "tuple" else [root]
        shapes = hlo.arrays(x.shape)
        if len(parts) == len(shapes):
            return sum(read) + sum(map(partial(_written, inside), parts, shapes))
        return sum(read) + _stored(x.shape)
    if x.opcode in ("dynamic-slice", "dynamic-update-slice"):
        part = x if x.opcode == "dynamic-slice" else computation.instructions[x.operands[1]]
        return 2 * _stored(part.shape)
    return _stored(x.shape) + sum(_stored(y.shape) for y in computation.operands(x))


def _stored(shape: str) -> int:
    return sum(nbytes(part) for part in hlo.arrays(shape) if "S(1)" not in part)


def _read(inside: Computation, x: Instruction, shape: str) -> int:
    """Bytes of a fusion's operand of this shape, `x` inside, that are read."""
    users = [y for y in inside.instructions.values() if x.name in y.operands]
    total = 0
    for y in users:
        if y.opcode == "bitcast":
            total += _read(inside, y, shape)
        elif y.opcode == "dynamic-slice" and y.operands[0] == x.name:
            total += min(nbytes(y.shape), _stored(shape))
        elif y.opcode != "dynamic-update-slice" or y.operands[0] != x.name:
            return _stored(shape)
    return min(total, _stored(shape))


def _written(inside: Computation, x: Instruction, shape: str) -> int:
    """Bytes of a fusion's result of this shape, `x` inside, that are written."""
    while x.opcode == "bitcast" and inside.operands(x):
        x = inside.operands(x)[0]
    if x.opcode == "dynamic-update-slice":
        return min(nbytes(inside.instructions[x.operands[1]].shape), _stored(shape))
    return _stored(shape)


def _products(program: Program, computation: Computation, x: Instruction) -> int:
    """Floating-point operations of the matrix products of an instruction, or inside of it."""
    if x.opcode == "fusion":
        inner = [program.computations[name] for name in x.called("calls")]
        return sum(_products(program, c, y) for c in inner for y in c.instructions.values())
    if x.opcode == "dot" or 'custom_call_target="__cublas' in x.attributes:
        found = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)', x.attributes)
        lhs = _dims(computation.instructions[x.operands[0]].shape)
        length = 1
        for axis in re.findall(r"\d+", found[1] if found else ""):
            length *= lhs[int(axis)]
        return 2 * _size(_dims(hlo.arrays(x.shape)[0])) * length
    if x.opcode == "convolution":
        kernel = _dims(computation.instructions[x.operands[1]].shape)
        labels = re.search(r"dim_labels=\w+_(\w+)->", x.attributes)
        out = kernel[labels[1].index("o")] if labels else 1
        return 2 * _size(_dims(x.shape)) * _size(kernel) // max(out, 1)
    return 0


def _dims(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _size(dims: list[int]) -> int:
    total = 1
    for n in dims:
        total *= n
    return total
