"""Read the text of a compiled program: computations, instructions, and how often each runs."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what the parentheses hold: a constant's value, a parameter's number
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names, such as "calls", "body" or "branch_computations"."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclass
class Computation:
    """A list of instructions in the order of the schedule."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that another one reads."""
        return [self.instructions[x] for x in instruction.operands if x in self.instructions]


@dataclass(frozen=True)
class Program:
    """A compiled module for one device."""

    computations: dict[str, Computation]
    entry: str


@dataclass(frozen=True)
class Visit:
    """A computation at one place where it is called, and how often the program executes it there."""

    computation: Computation
    times: int
    exact: bool  # False in a branch, or in a loop that runs until data say so, which counts as one trip
    scope: "_Scope"


def parse(text: str) -> Program:
    """Parse `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from frugax.planner.program import parse
        >>> program = parse(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text())
        >>> program.entry in program.computations
        True
    """
    computations: dict[str, Computation] = {}
    entry, now = "", None
    for line in text.splitlines():
        if now is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                now = computations[head[2]] = Computation(head[2])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            now = None
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            instruction = _instruction(found[2], line, found.end())
            now.instructions[instruction.name] = instruction
            now.root = instruction.name if found[1] else now.root
    if not entry:
        raise ValueError(
            f"text: got {text[:40]!r}...; expected compiled.as_text(), with an ENTRY computation"
        )
    return Program(computations, entry)


def _instruction(name: str, line: str, at: int) -> Instruction:
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    opens = line.index("(", end)
    closes = _closing(line, opens)
    inside = line[opens + 1 : closes - 1]
    return Instruction(
        name=name,
        shape=line[at:end],
        opcode=line[end:opens].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=line[closes:],
    )


def _closing(line: str, opens: int) -> int:
    """The place after the parenthesis that closes the one at `opens`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opens):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"text: got {line[opens : opens + 60]!r}; expected closed parentheses")


def nbytes(shape: str) -> int:
    """The bytes of an array or a tuple in a program's text, without padding.

    Example:
        >>> from frugax.planner.program import nbytes
        >>> nbytes("bf16[2,3]{1,0:T(8,128)(2,1)}"), nbytes("(f32[2], s4[8], pred[])")
        (12, 13)
    """
    bits = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\]", shape):
        width = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        bits += 8 * math.ceil(width * math.prod(int(d.strip("<=")) for d in dims.split(",") if d) / 8)
    return bits // 8


def visits(program: Program) -> Iterator[Visit]:
    """Go through the computations that control flow and calls reach, from the entry on; not into fusions."""
    entry = program.computations[program.entry]
    yield from _visits(program, _Scope(entry), 1, True)


def _visits(program: Program, scope: "_Scope", times: int, exact: bool) -> Iterator[Visit]:
    yield Visit(scope.computation, times, exact, scope)
    for x in scope.computation.instructions.values():
        if x.opcode == "while":
            body = _Scope(program.computations[x.called("body")[0]], scope, x, program)
            trips = _trips(program, x, scope)
            yield from _visits(
                program, body, times * (1 if trips is None else trips), exact and trips is not None
            )
        elif x.opcode == "conditional":
            both = x.called("true_computation") + x.called("false_computation")
            for name in x.called("branch_computations") or both:
                yield from _visits(program, _Scope(program.computations[name]), times, False)
        elif x.opcode == "call":
            for name in x.called("to_apply"):
                inner = _Scope(program.computations[name], scope, x, program)
                yield from _visits(program, inner, times, exact)


class _Scope:
    """A computation with the instruction that calls it, through which constants come in."""

    def __init__(self, computation: Computation, outer: "_Scope | None" = None, caller=None, program=None):
        self.computation, self.outer, self.caller, self.program = computation, outer, caller, program

    def value(self, name: str, index: int | None = None, depth: int = 0) -> int | None:
        """The integer that a scalar (or a tuple's element) always has; None if that can't be told."""
        x = self.computation.instructions.get(name)
        if x is None or depth > 60:
            return None
        first = x.operands[0] if x.operands else ""
        if x.opcode == "constant":
            return int(x.literal) if re.fullmatch(r"-?\d+", x.literal) else None
        if x.opcode in ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier"):
            return self.value(first, index, depth + 1)
        if x.opcode == "copy-start":
            return self.value(first, None, depth + 1)
        if x.opcode == "get-tuple-element":
            return self.value(first, _index(x), depth + 1)
        if x.opcode == "tuple" and index is not None:
            return self.value(x.operands[index], None, depth + 1)
        if x.opcode == "while" and index is not None:
            return self.value(first, index, depth + 1) if _carried(self.program, x, index) else None
        if x.opcode == "fusion" and self.program:
            inner = _Scope(self.program.computations[x.called("calls")[0]], self, x, self.program)
            return inner.value(inner.computation.root, index, depth + 1)
        if x.opcode == "parameter" and self.caller is not None:
            if self.caller.opcode == "while":
                if index is None or not _carried(self.program, self.caller, index):
                    return None
                return self.outer.value(self.caller.operands[0], index, depth + 1)
            return self.outer.value(self.caller.operands[int(x.literal)], index, depth + 1)
        if x.opcode in ("add", "subtract", "multiply"):
            a, b = (self.value(y, None, depth + 1) for y in x.operands)
            if a is None or b is None:
                return None
            return {"add": a + b, "subtract": a - b, "multiply": a * b}[x.opcode]
        return None


def _index(x: Instruction) -> int:
    """The element that a get-tuple-element takes."""
    return int(re.findall(r"index=(\d+)", x.attributes)[0])


def _index_read(computation: Computation, name: str) -> int | None:
    """The element of the computation's parameter that an instruction hands on, if it does."""
    x = computation.instructions.get(name)
    while x is not None and x.opcode in ("copy", "bitcast", "convert"):
        x = computation.instructions.get(x.operands[0])
    if x is None or x.opcode != "get-tuple-element":
        return None
    read = computation.instructions[x.operands[0]]
    return _index(x) if read.opcode == "parameter" else None


def _next(program: Program, loop: Instruction, index: int) -> tuple[Computation, str]:
    """Find the instruction of a loop's body that makes the next value of an element of its state."""
    body = program.computations[loop.called("body")[0]]
    root = body.instructions[body.root]
    return body, (root.operands[index] if root.opcode == "tuple" else "")


def _carried(program: Program | None, loop: Instruction, index: int) -> bool:
    """Say if a loop hands an element of its state on unchanged."""
    return program is not None and _index_read(*_next(program, loop, index)) == index


def _operands_through_fusion(program, computation, name) -> tuple[Instruction | None, list[str]]:
    """An instruction, or the root of the fusion it is, with operands named in `computation`."""
    x = computation.instructions.get(name)
    if x is None or x.opcode != "fusion":
        return x, list(x.operands) if x else []
    inner = program.computations[x.called("calls")[0]]
    root = inner.instructions[inner.root]
    names = []
    for operand in root.operands:
        y = inner.instructions[operand]
        while y.opcode in ("bitcast", "copy", "convert"):
            y = inner.instructions[y.operands[0]]
        if y.opcode == "parameter":
            names.append(x.operands[int(y.literal)])
        else:
            names.append(y.literal if y.opcode == "constant" else "")
    return root, names


def _trips(program: Program, loop: Instruction, scope: _Scope) -> int | None:
    """Count the runs of a loop's body: as the compiler noted, or as `i < n` in its condition says."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    scope.program = program
    inside = _Scope(program.computations[loop.called("condition")[0]], scope, loop, program)
    compare, sides = _operands_through_fusion(program, inside.computation, inside.computation.root)
    if compare is None or compare.opcode != "compare":
        return None
    direction = compare.attributes.partition("direction=")[2][:2]
    if _index_read(inside.computation, sides[0]) is None or inside.value(sides[0]) is not None:
        sides, direction = (
            sides[::-1],
            {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(direction, direction),
        )
    index = _index_read(inside.computation, sides[0])
    end = int(sides[1]) if re.fullmatch(r"-?\d+", sides[1]) else inside.value(sides[1])
    if index is None or end is None:
        return None
    start = scope.value(loop.operands[0], index)
    body, name = _next(program, loop, index)
    step = _step(program, _Scope(body, scope, loop, program), name, index)
    if start is None or not step:
        return None
    if direction in ("LE", "GE"):
        end += 1 if direction == "LE" else -1
    if direction == "NE" or (direction in ("LT", "LE")) == (step > 0):
        return max(math.ceil((end - start) / step), 0)
    return None


def _step(program: Program, scope: _Scope, name: str, index: int) -> int | None:
    x, operands = _operands_through_fusion(program, scope.computation, name)
    if x is None or x.opcode not in ("add", "subtract"):
        return None
    steps = [y for y in operands if _index_read(scope.computation, y) != index]
    if len(steps) != 1:
        return None
    step = int(steps[0]) if re.fullmatch(r"-?\d+", steps[0]) else scope.value(steps[0])
    return -step if x.opcode == "subtract" and step is not None else step


def config_of(x: Instruction) -> dict[str, Any]:
    """The backend's own notes on an instruction, such as TPU's estimate of its cycles; {} without notes."""
    at = x.attributes.find("backend_config={")
    if at < 0:
        return {}
    try:
        return json.JSONDecoder().raw_decode(x.attributes[at + len("backend_config=") :])[0]
    except json.JSONDecodeError:
        return {}
