"""The plan of a training step: what a compiled program takes of the devices that it was compiled for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from . import hlo
from .flops import Flops
from .program import parse
from .timeline import Point, timeline
from .timing import Times, times
from .topology import Topology


@dataclass(frozen=True)
class Plan:
    """The demands of a step on each device, and its time.

    Attributes:
      topology: its name.
      mesh: sizes by axis; those of size 1 are left out.
      bytes: by kind, of one device: the arguments ("params", "optimizer", "batch", ...), "gradients",
        "activations", "outputs" that take no argument's place, and "padding" that the compiler adds to
        arguments. Their sum is `total`.
      code: bytes of the program itself, where that is in the device's memory.
      host: bytes in the memory of the device's host: what is offloaded.
      memory: bytes that the device has; None for CPUs.
      model_flops: operations that the model needs, on all devices; 0 where none were given.
      executed_flops: operations of the program: recomputation, the optimizer and the rest included.
      exact: False where a loop's trips or a branch are unknown; then operations, collectives and times are of
        one trip, and of each branch.
      collectives: bytes that a device sends in one step, by mesh axes and kind.
      times: seconds by what they are spent on; None for CPUs.
      points: temporary bytes over the schedule.
      unread: why the compiled text can't be had, "" where it can. Then there are no collectives, times and
        points.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> system = frugax.planner.topology("cpu:1")
        >>> mesh = frugax.parallel.make_mesh(devices=system.devices)
        >>> x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
        >>> step = jax.jit(lambda x: 2 * x, donate_argnums=0).lower(x)
        >>> made = frugax.planner.plan(step, topology=system, mesh=mesh, arguments={"params": x})
        >>> isinstance(made, frugax.planner.Plan), made.bytes["params"], made.fits()
        (True, 1024, None)
    """

    topology: str
    mesh: dict[str, int]
    devices: int
    bytes: dict[str, int]
    code: int
    host: int
    memory: int | None
    model_flops: int
    executed_flops: int
    exact: bool
    collectives: dict[tuple[tuple[str, ...], str], int]
    times: Times | None
    peak: float | None  # FLOPs a second of one device
    points: list[Point] = field(repr=False)
    unread: str = ""

    @property
    def total(self) -> int:
        """Bytes of one device: arguments, outputs that take no argument's place, and temporaries."""
        return sum(self.bytes.values())

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: the model's operations over what the devices could do in that time."""
        if self.times is None or not self.model_flops:
            return None
        return mfu(self.model_flops, self.devices, self.peak, self.times.step)

    def fits(self, spare: float = 0.1) -> bool | None:
        """Say if the bytes and the program leave this share of the memory free; None for CPUs."""
        return None if self.memory is None else self.total + self.code <= (1 - spare) * self.memory

    def as_dict(self) -> dict[str, Any]:
        """All but the points, for JSON."""
        return {
            "topology": self.topology,
            "mesh": self.mesh,
            "devices": self.devices,
            "bytes_per_device": self.bytes,
            "total_bytes": self.total,
            "code_bytes": self.code,
            "host_bytes": self.host,
            "memory_bytes": self.memory,
            "fits_with_a_tenth_to_spare": self.fits(),
            "model_flops": self.model_flops,
            "executed_flops": self.executed_flops,
            "exact": self.exact,
            "unread": self.unread,
            "sent_bytes": {
                f"{kind} over {'+'.join(axes)}": n for (axes, kind), n in self.collectives.items()
            },
            "seconds": None if self.times is None else self.times._asdict() | {"step": self.times.step},
            "mfu": self.mfu,
        }

    def table(self) -> str:
        """The plan in lines, for a terminal."""
        name, gib = ("GiB", 2**30) if self.total > 2**30 else ("MiB", 2**20)
        shape = " * ".join(f"{name}={n}" for name, n in self.mesh.items()) or "one device"
        lines = [f"{self.topology}: {self.devices} devices, {shape}", "", f"{name} a device"]
        lines += [f"  {kind:<24}{n / gib:>10.3f}" for kind, n in self.bytes.items()]
        of = "" if self.memory is None else f"   of {self.memory / gib:.1f}"
        lines += [f"  {'total':<24}{self.total / gib:>10.3f}{of}"]
        lines += [f"  {'the program':<24}{self.code / gib:>10.3f}"] if self.code else []
        lines += [f"  {'offloaded to the host':<24}{self.host / gib:>10.3f}"] if self.host else []
        if self.unread:
            lines += ["", f"The compiled text can't be read: {self.unread}"]
            lines += ["So nothing is known here of collectives, times and the schedule."]
        lines += [] if self.unread else ["", "MB a device sends in a step"]
        for (axes, kind), n in sorted(self.collectives.items()):
            lines.append(f"  {kind + ' over ' + '+'.join(axes):<44}{n / 1e6:>10.2f}")
        lines += [] if self.collectives or self.unread else ["  nothing"]
        lines += ["", "TFLOPs of a step, all devices"]
        lines += [f"  {'model':<24}{self.model_flops / 1e12:>10.6g}"] if self.model_flops else []
        lines += [f"  {'executed':<24}{self.executed_flops / 1e12:>10.6g}"]
        if self.times is not None:
            t = self.times
            lines += ["", "ms of a step, estimated"]
            rows = {
                "the compiler's estimate": t.compiler,
                "others, by roofline": t.roofline,
                "Pallas kernels, by roofline": t.kernels,
                "exposed communication": t.exposed,
                "step": t.step,
                "hidden communication": t.hidden,
            }
            lines += [f"  {what:<32}{seconds * 1e3:>10.3f}" for what, seconds in rows.items()]
        if self.mfu is not None:
            lines += ["", f"predicted MFU {self.mfu:.1%}"]
        if not self.exact:
            lines += ["", "A loop's trips or a branch are unknown: each loop counts once, and each branch."]
        return "\n".join(lines)


def mfu(model_flops: float | int, devices: int, peak: float, seconds: float) -> float:
    """Model FLOPs utilization: operations that the model needs, over those that the devices could do.

    Args:
      model_flops: of a step, on all devices together; without recomputation.
      devices: how many.
      peak: FLOPs a second of one device.
      seconds: of a step.

    Source: PaLM, Chowdhery et al. 2022 (arXiv 2204.02311), appendix B.

    Example:
        >>> import frugax
        >>> frugax.planner.mfu(4e15, devices=8, peak=1e15, seconds=1.0)
        0.5
    """
    return model_flops / (devices * peak * seconds)


def plan(
    step: Any,
    *,
    topology: Topology,
    mesh: Mesh,
    arguments: Mapping[str, Any],
    gradients: Any = None,
    executed: Flops | None = None,
    model_flops: int = 0,
    text: str = "",
) -> Plan:
    """Read a plan off a compiled step; nothing runs.

    Bytes are those of `memory_analysis`. Arguments are told apart by their shapes and shardings. Of the
    temporaries, the bytes of `gradients` count as gradients and the rest as activations; where gradients are
    freed layer by layer, that says too much of the former. For the times see `frugax.planner.timing.times`.

    Args:
      step: a `jax.stages.Compiled`, or a `jax.stages.Lowered`, which is compiled.
      topology: the devices that it was compiled for.
      mesh: how they are laid out.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings by kind: {"params": ..., "batch": ...}.
      gradients: such a tree, of the gradients.
      executed: `frugax.planner.flops` of the step.
      model_flops: of the model, forward and backward, on all devices.
      text: the compiled program's, where `as_text()` can't print it. Compiled with
        `{"xla_dump_to": FOLDER, "xla_dump_hlo_as_text": True}`, a TPU's is FOLDER/*after_codegen.txt.

    Returns:
      A `Plan`.

    Raises:
      ValueError: `arguments` take more than those of the program.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> system = frugax.planner.topology("cpu:1")
        >>> mesh = frugax.parallel.make_mesh(devices=system.devices)
        >>> place = jax.NamedSharding(mesh, jax.P())
        >>> w = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=place)
        >>> step = jax.jit(lambda w: w - w @ w, donate_argnums=0).lower(w).compile()
        >>> frugax.planner.plan(step, topology=system, mesh=mesh, arguments={"params": w}).bytes["params"]
        256
    """
    compiled = step.compile() if hasattr(step, "compile") else step
    said = compiled.memory_analysis()
    by_kind = {kind: shard_bytes(tree) for kind, tree in arguments.items()}
    outputs = said.output_size_in_bytes - said.alias_size_in_bytes
    padding = said.argument_size_in_bytes - sum(by_kind.values())
    if padding < 0:
        raise ValueError(
            f"arguments: got {sum(by_kind.values())} bytes a device; expected at most the program's "
            f"{said.argument_size_in_bytes}, those that it reads"
        )
    of_gradients = min(shard_bytes(gradients), said.temp_size_in_bytes)
    by_kind |= {
        "gradients": of_gradients,
        "activations": said.temp_size_in_bytes - of_gradients,
        "outputs": outputs,
        "padding": padding,
    }
    program, unread = None, ""
    try:
        program = parse(text or compiled.as_text())
    except jax.errors.JaxRuntimeError as error:  # libtpu may write what an older jaxlib does not know
        unread = str(error).partition("\n")[0]
    collectives: dict[tuple[tuple[str, ...], str], int] = {}
    exact = True if executed is None else executed.exact
    for one in hlo.collectives(program, mesh) if program else ():
        key = one.axes, one.kind
        collectives[key] = collectives.get(key, 0) + one.wire_bytes * one.times
        exact = exact and one.exact
    chip = topology.chip
    return Plan(
        topology=topology.name,
        mesh={name: n for name, n in mesh.shape.items() if n > 1},
        devices=mesh.size,
        bytes=by_kind,
        code=said.generated_code_size_in_bytes if topology.platform == "tpu" else 0,
        host=said.host_argument_size_in_bytes
        + said.host_output_size_in_bytes
        - said.host_alias_size_in_bytes
        + said.host_temp_size_in_bytes,
        memory=chip.memory if chip else None,
        model_flops=model_flops,
        executed_flops=executed.total if executed else 0,
        exact=exact,
        collectives=collectives,
        times=times(program, mesh, topology, executed) if chip and program else None,
        peak=chip.peak if chip else None,
        points=timeline(program) if program else [],
        unread=unread,
    )


def shard_bytes(tree: Any) -> int:
    """The bytes of one device's share of `jax.ShapeDtypeStruct`s with shardings, or of arrays."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        dtype = x.dtype
        if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, dtype))
            shape, dtype = x.shape, x.dtype
        size = 1
        for n in shape:
            size *= n
        total += -(-size * jax.dtypes.itemsize_bits(dtype) // 8)
    return total
