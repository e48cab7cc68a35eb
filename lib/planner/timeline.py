"""The memory that a compiled program holds over its schedule."""

import math
import re
from typing import NamedTuple

from .hlo import arrays
from .program import Computation, Instruction, Program, nbytes

PHASES = ("forward", "backward", "update")
# Other names of the same bytes, or results in the place of an operand.
_VIEWS = {
    "bitcast", "get-tuple-element", "tuple", "while", "optimization-barrier", "opt-barrier", "async-update",
    "dynamic-update-slice",
}  # fmt: skip
_Buffers = list[frozenset[tuple[str, int]]]  # of each element of an instruction's result


class Point(NamedTuple):
    """Temporary bytes while one instruction runs, by the pass that made them."""

    name: str
    bytes: dict[str, int]  # by PHASES

    @property
    def total(self) -> int:
        """Bytes of all passes."""
        return sum(self.bytes.values())


def timeline(program: Program) -> list[Point]:
    """Temporary bytes of HBM over a program's schedule, one trip of each loop.

    A buffer lives from the instruction that makes it to the last that reads it. The program's results are
    buffers of their own and no temporaries, nor are its arguments. A loop's carry keeps its place. A fusion
    takes the place of an operand of its size that is read for the last time. The compiler packs buffers, and
    may keep some longer: `memory_analysis` has the bytes that it asks for. "forward" is what the first pass
    of differentiation makes (activations, and their recomputation), "backward" its transpose (gradients),
    "update" all else; a copy belongs to what it copies.

    Args:
      program: `parse` of the text of a scheduled program.
    """
    return _timeline(program, program.computations[program.entry], frozenset(), 0)


def _timeline(program: Program, computation: Computation, kept: frozenset[str], depth: int) -> list[Point]:
    instructions = computation.instructions
    root = instructions[computation.root]
    results = set(root.operands if root.opcode == "tuple" else [root.name]) if depth == 0 else kept
    buffers: dict[str, _Buffers] = {}
    last: dict[tuple[str, int], int] = {}
    sizes: dict[tuple[str, int], int] = {}
    made: dict[str, list[tuple[str, int]]] = {}
    phases: dict[str, str] = {}
    for at, x in enumerate(instructions.values()):
        of_operands = [buffers.get(y, []) for y in x.operands]
        read = frozenset(n for several in of_operands for one in several for n in one)
        phases[x.name] = phase(x) or next((phases[n] for n, _ in sorted(read)), "update")
        buffers[x.name] = _handed_on(x, of_operands, read)
        if buffers[x.name] == [] and x.opcode not in ("parameter", "constant") and x.name not in results:
            new = {(x.name, i): size for i, size in enumerate(_new_bytes(computation, x))}
            sizes |= new
            made[x.name] = list(new)
            # What is under way keeps its operand.
            also = read if x.opcode.endswith("-start") else frozenset()
            buffers[x.name] = [frozenset([n]) | also for n in new]
            last |= dict.fromkeys(new, at)
        if x.opcode not in ("tuple", "get-tuple-element", "bitcast"):
            last |= dict.fromkeys(read, at)
    dying: dict[int, list[tuple[str, int]]] = {}
    for name, at in last.items():
        dying.setdefault(at, []).append(name)
    points, live = [], dict.fromkeys(PHASES, 0)
    reused: set[tuple[str, int]] = set()
    for at, x in enumerate(instructions.values()):
        ends = dying.get(at, [])
        for name in made.get(x.name, ()):
            size = sizes[name]
            same = [n for n in ends if n[0] != x.name and sizes[n] == size and n not in reused]
            if same and _in_place(x):
                live[phases[same[0][0]]] -= size
                reused.add(same[0])
            live[phases[x.name]] += size
        inner = _inner(program, x, depth)
        if inner:
            points += [Point(p.name, {k: live[k] + p.bytes[k] for k in PHASES}) for p in inner]
        elif any(sizes[n] for n in made.get(x.name, ())):
            points.append(Point(x.name, dict(live)))
        for name in ends:
            if name not in reused:
                live[phases[name[0]]] -= sizes[name]
    return points


def _handed_on(x: Instruction, of_operands: list[_Buffers], read: frozenset[tuple[str, int]]) -> _Buffers:
    """The buffers of a result that are its operands' too; empty where it makes its own."""
    if x.opcode == "tuple":
        return [frozenset().union(*several) for several in of_operands]
    if x.opcode == "get-tuple-element":
        index = int(x.attributes.partition("index=")[2].partition(",")[0])
        return of_operands[0][index : index + 1] if of_operands[0] else [frozenset()]
    if x.opcode == "while":
        return of_operands[0]
    if x.opcode in _VIEWS or x.opcode.endswith("-done"):
        return [read]
    return []


def _new_bytes(computation: Computation, x: Instruction) -> list[int]:
    """The bytes of each array that an instruction makes."""
    if x.opcode.endswith("-start") and x.shape.startswith("("):  # its operands are among its results
        return [max(held_bytes(x.shape) - sum(held_bytes(y.shape) for y in computation.operands(x)), 0)]
    return [held_bytes(part) for part in arrays(x.shape)] or [0]


def _inner(program: Program, x: Instruction, depth: int) -> list[Point]:
    """The points of a loop's body, or of the branch that holds most."""
    if x.opcode == "while":
        body = program.computations[x.called("body")[0]]
        root = body.instructions[body.root]
        # What a body makes for its next trip takes the place of the carry, which is counted outside.
        return _timeline(program, body, frozenset(root.operands), depth + 1)
    names = x.called("branch_computations") + x.called("true_computation") + x.called("false_computation")
    names += x.called("to_apply") if x.opcode == "call" else []
    found = [_timeline(program, program.computations[n], frozenset(), depth + 1) for n in names]
    return max(found, key=lambda points: max((p.total for p in points), default=0), default=[])


def _in_place(x: Instruction) -> bool:
    return (
        x.opcode not in ("dot", "convolution", "custom-call", "copy", "transpose")
        and "kOutput" not in x.attributes
    )


def phase(x: Instruction) -> str:
    """The pass of the training step that an instruction belongs to, from its name in JAX; "" without one."""
    name = x.attributes.partition('op_name="')[2].partition('"')[0]
    if not name:
        return ""
    if "transpose(" in name and "rematted_computation" not in name:
        return "backward"
    return "forward" if "jvp(" in name or "rematted_computation" in name else "update"


def held_bytes(shape: str) -> int:
    """The bytes of HBM that arrays take, with the padding of a TPU's tiles; 0 in its other memories.

    Example:
        >>> from frugax.planner.timeline import held_bytes
        >>> [held_bytes("f32[9,100]" + layout) for layout in ("{1,0:T(8,128)}", "{1,0:T(8,128)S(1)}")]
        [8192, 0]
    """
    total = 0
    for array in arrays(shape):
        if re.search(r"S\([1-9]\)", array):
            continue
        tiled = re.match(r"(\w+)\[([\d,]*)\]\{([\d,]*):T\(([\d,]+)\)", array)
        if not tiled:
            total += nbytes(array)
            continue
        dims = [int(n) for n in tiled[2].split(",") if n]
        minor = [int(n) for n in tiled[3].split(",") if n]
        tile = [int(n) for n in tiled[4].split(",")]
        for axis, size in zip(minor, reversed(tile), strict=False):
            dims[axis] = math.ceil(dims[axis] / size) * size
        total += nbytes(f"{tiled[1]}[{','.join(map(str, dims))}]")
    return total
