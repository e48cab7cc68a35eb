"""The collectives that a compiled program executes, read from its text."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .program import Computation, Instruction, Program, nbytes, parse
from .visits import Visit, visits

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    `wire_bytes` is what one device sends in one execution, with n devices in a group: (n - 1) / n of the
    payload for all-gather, reduce-scatter and all-to-all, twice that for all-reduce (a reduce-scatter and an
    all-gather round a ring), the payload for collective-permute and collective-broadcast.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = frugax.parallel.make_mesh()
        >>> by_row = jax.NamedSharding(mesh, jax.P("data"))
        >>> rows = jax.ShapeDtypeStruct((mesh.size, 8), jnp.float32, sharding=by_row)
        >>> text = jax.jit(lambda x: x.sum(0)).lower(rows).compile().as_text()
        >>> found = frugax.planner.collectives(text, mesh)  # the sum over devices, if there are several
        >>> all(one.kind == "all-reduce" and one.axes == ("data",) for one in found)
        True
    """

    name: str
    kind: str  # one of KINDS
    payload_bytes: int  # the whole array, in one execution: the gathered one, or the one before it is reduced
    wire_bytes: int
    axes: tuple[str, ...]  # of the mesh
    group_size: int
    times: int  # executions in one run of the program
    exact: bool  # False where `times` is a guess: a branch counts as taken, a loop of unknown trips as one
    asynchronous: bool  # starts at one place of the schedule and ends at another


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """The devices that talk to each other, from `replica_groups` in any of its forms.

    Devices are numbered as in `mesh.devices.flat`. The forms: `{{0,1},{2,3}}`, `{}` (all in one), the iota
    `[2,4]<=[4,2]T(1,0)`, and `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}` with axes, or parts of axes
    `'b':(1)2`, of a mesh of the compiler's own.
    """
    if mesh := re.search(r"replica_groups=@?mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", attributes):
        return _groups_of_mesh(*mesh.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(iota[2], iota[3]).reshape(_integers(iota[1])).tolist()
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [_integers(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    return [list(range(devices))]


def _integers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_integers(dims))).reshape(_integers(dims))
    return (ids.transpose(_integers(permutation)) if permutation else ids).ravel()


def _groups_of_mesh(sizes: str, order: str | None, chosen: str) -> list[list[int]]:
    """Groups along `chosen` axes; an axis of which a part is chosen is cut in three."""
    named = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    found = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    shape: list[int] = []
    place: dict[tuple[str, int], int] = {}
    for name, size in named.items():
        cuts = sorted((int(before or 1), int(part or size)) for other, before, part in found if other == name)
        at = 1
        for before, part in cuts:
            shape.append(before // at)
            place[name, before] = len(shape)
            shape.append(part)
            at = before * part
        shape.append(size // at)
    if iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", order or ""):
        ids = _iota(iota[1], iota[2])
    else:
        ids = np.array(_integers(order)) if order else np.arange(math.prod(shape))
    inner = [place[name, int(before or 1)] for name, before, _ in found]
    outer = [i for i in range(len(shape)) if i not in inner]
    size = math.prod(shape[i] for i in inner)
    return ids.reshape(shape).transpose(outer + inner).reshape(-1, size).tolist()


def collectives(text: str | Program, mesh: Any) -> list[Collective]:
    """List the collectives that a compiled program executes, in the order of its text.

    Args:
      text: `compiled.as_text()` for CPU, TPU or GPU; or what `parse` made of it.
      mesh: the mesh that it was compiled for, a `jax.sharding.Mesh`; or sizes by axis name, in its order.

    Returns:
      Each collective once, with how often it is executed. Those of one device alone are left out. On TPU, a
      collective that the compiler spreads over several fusions counts where it starts, and an all-reduce that
      is fused with the slice of its result is a reduce-scatter.

    Raises:
      ValueError: the text has no entry computation.

    Example:
        >>> from frugax.planner import hlo
        >>> text = '''ENTRY %main (x: f32[4]) -> f32[4] {
        ...   %x = f32[4] parameter(0)
        ...   ROOT %y = f32[4] all-reduce(%x), replica_groups=[1,2]<=[2]
        ... }'''
        >>> hlo.collectives(text, {"data": 2})[0].wire_bytes
        16
    """
    program = parse(text) if isinstance(text, str) else text
    sizes = dict(mesh if isinstance(mesh, Mapping) else mesh.shape)
    return [
        one
        for visit in visits(program)
        for x in visit.computation.instructions.values()
        for _, one in collectives_of(program, visit, x, sizes)
    ]


def collectives_of(
    program: Program, visit: Visit, x: Instruction, sizes: dict[str, int]
) -> list[tuple[str, Collective]]:
    """List the collectives that an instruction executes or starts, each with a key that its end has too."""
    found = []
    for inner, computation, sliced in _inside(program, visit.computation, x):
        one = _collective(inner, computation, sizes, sliced)
        if one:
            apart = x.opcode.endswith("-start") and '"is_sync":true' not in x.attributes
            apart = apart or _starts_chain(computation)
            times = {"times": visit.times, "exact": visit.exact, "asynchronous": apart}
            found.append((chain(inner) or x.name, Collective(**one, **times)))
    return found


def chain(x: Instruction) -> str:
    """The name of a collective that several fusions of a TPU program carry on; empty for others."""
    found = re.search(r'chain_id="(\w+)"', x.attributes)
    return f"chain {found[1]}" if found else ""


def arrays(shape: str) -> list[str]:
    """The arrays of a tuple's shape with their layouts; of an array, itself."""
    return re.findall(r"\w+\[[\d,<=]*\](?:\{[^}]*\})?", shape)


def _starts_chain(computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in x.attributes for x in computation.instructions.values())


def _inside(
    program: Program, computation: Computation, x: Instruction
) -> Iterator[tuple[Instruction, Computation, bool]]:
    """Yield (instruction, its computation, whether its result is sliced at once) of `x` or of its fusion."""
    if x.opcode.removesuffix("-start") in KINDS:
        yield x, computation, False
    elif x.opcode in ("fusion", "async-start"):
        for name in x.called("calls"):
            fused = program.computations[name]
            for y in fused.instructions.values():
                # A chain's later fusions name the collective again, to work beside it.
                if "chain_id=" in y.attributes and not _starts_chain(fused):
                    continue
                found = fused.instructions.values()
                results = {y.name} | {  # of several arrays each has its slice
                    z.name for z in found if z.opcode == "get-tuple-element" and z.operands[0] == y.name
                }
                slices = [z for z in found if z.opcode == "dynamic-slice" and z.operands[0] in results]
                sliced = y.opcode == "all-reduce" and bool(slices)
                yield from ((a, b, sliced or c) for a, b, c in _inside(program, fused, y))


def _collective(x: Instruction, computation: Computation, sizes: dict[str, int], sliced: bool):
    kind = x.opcode.removesuffix("-start")
    devices = math.prod(sizes.values())
    operands = computation.operands(x)
    size = sum(nbytes(y.shape) for y in operands)
    if kind == "collective-permute":
        listed = x.attributes.partition("source_target_pairs=")[2]
        pairs = [_integers(p) for p in re.findall(r"\{(\d+,\d+)\}", listed)]
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        if "slice_sizes=" in x.attributes:  # into a part of a buffer that is among the operands
            size = nbytes(operands[0].shape)
        axes, n = _axes_of(np.array(pairs, int).reshape(-1, 2), sizes), 2 if pairs else 1
    else:
        groups = device_groups(x.attributes, devices)
        n = max(map(len, groups))
        axes = _axes_of(np.array([g for g in groups if len(g) == n]), sizes)
    if n == 1:
        return None
    kind = "reduce-scatter" if sliced else kind
    payload = size * n if kind == "all-gather" else size
    share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
    return dict(
        name=x.name,
        kind=kind,
        payload_bytes=payload,
        wire_bytes=round(share.get(kind, (n - 1) / n) * payload),
        axes=axes,
        group_size=n,
    )


def _axes_of(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the members of a group differ."""
    places = np.unravel_index(groups, tuple(sizes.values()))
    return tuple(name for name, at in zip(sizes, places, strict=True) if np.any(at != at[:, :1]))
