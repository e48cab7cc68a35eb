"""The visits of a compiled program to its computations: trips of loops, read off their conditions."""

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .program import Computation, Instruction, Program


@dataclass(frozen=True)
class Visit:
    """A computation at one place where it is called, and how often the program executes it there."""

    computation: Computation
    times: int
    exact: bool  # False in a branch, or in a loop that runs until data say so, which counts as one trip
    scope: "_Scope"


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
    """A computation with the instruction that calls it, through which constants come in.

    `given` is the state at the start of a trip, of a loop's body or condition; None for an element not known.
    """

    def __init__(
        self,
        computation: Computation,
        outer: "_Scope | None" = None,
        caller: Instruction | None = None,
        program: Program | None = None,
        given: list[int | None] | None = None,
    ):
        self.computation, self.outer, self.caller, self.program = computation, outer, caller, program
        self.given = given
        self.known: dict[tuple[str, int | None], int | None] = {}

    def value(self, name: str, index: int | None = None, depth: int = 0) -> int | None:
        """The integer that a scalar (or a tuple's element) always has; None if that can't be told."""
        if (name, index) not in self.known:  # or what is used twice at each step takes 2^steps
            self.known[name, index] = self._value(name, index, depth)
        return self.known[name, index]

    def _value(self, name: str, index: int | None, depth: int) -> int | None:
        x = self.computation.instructions.get(name)
        if x is None or depth > 60:
            return None
        first = x.operands[0] if x.operands else ""
        if x.opcode == "constant":
            if x.literal in ("true", "false"):
                return int(x.literal == "true")
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
        if x.opcode == "parameter" and self.given is not None:
            return None if index is None else self.given[index]
        if x.opcode == "parameter" and self.caller is not None:
            if self.caller.opcode == "while":
                if index is None or not _carried(self.program, self.caller, index):
                    return None
                return self.outer.value(self.caller.operands[0], index, depth + 1)
            return self.outer.value(self.caller.operands[int(x.literal)], index, depth + 1)
        if x.opcode == "bitcast-convert":
            if self.computation.instructions[first].shape[:4] not in ("s32[", "u32["):
                return None  # the bits of a float
            return _wrapped(self.value(first, index, depth + 1), x.shape)
        if x.opcode == "select":
            chosen = self.value(first, None, depth + 1)
            return None if chosen is None else self.value(x.operands[1 if chosen else 2], None, depth + 1)
        operation = _COMPARE[_direction(x)] if x.opcode == "compare" else _BINARY.get(x.opcode)
        if operation is None:
            return None
        a, b = (self.value(y, None, depth + 1) for y in x.operands)
        return None if a is None or b is None else _wrapped(int(operation(a, b)), x.shape)


_BINARY = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


def _direction(x: Instruction) -> str:
    return x.attributes.partition("direction=")[2][:2]


def _wrapped(value: int | None, shape: str) -> int | None:
    """An integer as a scalar of 32 bits has it; of another shape, itself."""
    if value is None or shape[:4] not in ("s32[", "u32["):
        return value
    value %= 2**32
    return value - 2**32 if shape[0] == "s" and value >= 2**31 else value


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
    """Count the runs of a loop's body: as the compiler noted, or as its condition says."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    scope.program = program
    trips = _trips_of_one_counter(program, loop, scope)
    return _trips_of_several(program, loop, scope) if trips is None else trips


def _trips_of_one_counter(program: Program, loop: Instruction, scope: _Scope) -> int | None:
    """Count the trips of a loop whose condition is `i < n`, or another comparison of a counter."""
    inside = _Scope(program.computations[loop.called("condition")[0]], scope, loop, program)
    compare, sides = _operands_through_fusion(program, inside.computation, inside.computation.root)
    if compare is None or compare.opcode != "compare":
        return None
    direction = _direction(compare)
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


def _trips_of_several(program: Program, loop: Instruction, scope: _Scope) -> int | None:
    """Count the trips of a loop whose condition reads several counters that grow evenly.

    TPUs hold a counter of 64 bits in two words: `hi < n_hi or (hi == n_hi and lo < n_lo)`.
    """
    body = program.computations[loop.called("body")[0]]
    condition = program.computations[loop.called("condition")[0]]
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    words = [i for i, x in enumerate(body.operands(root)) if x.shape[:5] in ("s32[]", "u32[]")]

    def state(of: Callable[[int], int | None]) -> list[int | None]:
        return [of(i) if i in words else None for i in range(len(root.operands))]

    def after(given: list[int | None]) -> list[int | None]:
        inside = _Scope(body, scope, loop, program, given)
        return state(lambda i: inside.value(root.operands[i]))

    def before(trip: int) -> list[int | None]:
        both = zip(first, steps, strict=True)
        return [None if a is None or step is None else a + trip * step for a, step in both]

    def holds(given: list[int | None]) -> int | None:
        return _Scope(condition, scope, loop, program, given).value(condition.root)

    first = state(lambda i: scope.value(loop.operands[0], i))
    second = after(first)
    steps = [
        None if a is None or b is None or c is None or c - b != b - a else b - a
        for a, b, c in zip(first, second, after(second), strict=True)
    ]
    low, high = 0, 1  # doubled until the condition holds at low - 1 and no longer at high - 1
    while high < 2**31 and holds(before(high - 1)):
        low, high = high, 2 * high
    if holds(before(high - 1)) != 0:
        return None
    high -= 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(before(middle)) else (low, middle)
    # They grew evenly up to the last trip, and what it leaves ends the loop: a word may run over there.
    even = low < 2 or all(
        a in (None, b) for a, b in zip(before(low - 1), after(before(low - 2)), strict=True)
    )
    ends = low < 1 or holds(after(before(low - 1))) == 0
    return low if even and ends else None


def _step(program: Program, scope: _Scope, name: str, index: int) -> int | None:
    x, operands = _operands_through_fusion(program, scope.computation, name)
    if x is None or x.opcode not in ("add", "subtract"):
        return None
    steps = [y for y in operands if _index_read(scope.computation, y) != index]
    if len(steps) != 1:
        return None
    step = int(steps[0]) if re.fullmatch(r"-?\d+", steps[0]) else scope.value(steps[0])
    return -step if x.opcode == "subtract" and step is not None else step
