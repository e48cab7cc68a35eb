"""Read the text of a compiled program: its computations and their instructions."""

import json
import math
import re
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


def config_of(x: Instruction) -> dict[str, Any]:
    """The backend's own notes on an instruction, such as TPU's estimate of its cycles; {} without notes."""
    at = x.attributes.find("backend_config={")
    if at < 0:
        return {}
    try:
        return json.JSONDecoder().raw_decode(x.attributes[at + len("backend_config=") :])[0]
    except json.JSONDecodeError:
        return {}
