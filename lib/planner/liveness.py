"""Peak memory of a program by the liveness of its jaxpr's values: no compiler, no device."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal

from ..optim.common.where_read import opened, operand_counts

# Calls that a compiler inlines, and the names of their parameter with the body.
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Other names of the same bytes: they take none of their own.
_VIEWS = {"reshape", "squeeze", "expand_dims", "transpose", "stop_gradient", "optimization_barrier", "name"}
# Made in the loop of whoever reads them, element by element.
_ELEMENTWISE = {
    "add", "sub", "mul", "div", "rem", "max", "min", "neg", "sign", "abs", "exp", "exp2", "expm1",
    "log", "log1p", "tanh", "logistic", "erf", "erfc", "erf_inv", "sqrt", "rsqrt", "cbrt", "pow",
    "integer_pow", "square", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh",
    "floor", "ceil", "round", "is_finite", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not",
    "xor", "select_n", "clamp", "convert_element_type", "reduce_precision", "broadcast_in_dim",
    "iota", "slice", "rev", "pad", "shift_left", "shift_right_logical", "shift_right_arithmetic",
    "nextafter", "add_any", "copy", "copy_p", "pvary",
    "one_minus_square",
}  # fmt: skip
# They read operands in one loop, so what is made element by element need not be stored for them.
_READERS = _ELEMENTWISE | {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax",
    "argmin", "dynamic_slice", "dynamic_update_slice", "concatenate",
}  # fmt: skip


class Liveness(NamedTuple):
    """Bytes that a program holds, by the order of its jaxpr.

    Attributes:
      arguments: bytes of its arguments.
      outputs: bytes of its results, without those that take the place of donated arguments.
      temporaries: the most bytes that are neither, at once.
      timeline: for each operation in order its name and the bytes of temporaries while it runs. A loop has
        one entry.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> found = frugax.planner.liveness(lambda x: jnp.sin(x @ x) @ x, jnp.ones((8, 8)))
        >>> found.arguments, found.outputs, found.temporaries  # x @ x, whose sine is put in its place
        (256, 256, 256)
        >>> [name for name, _ in found.timeline]
        ['dot_general', 'sin', 'dot_general']
    """

    arguments: int
    outputs: int
    temporaries: int
    timeline: tuple[tuple[str, int], ...]

    @property
    def peak(self) -> int:
        """Bytes of arguments, outputs and temporaries together: what a compiler asks the device for."""
        return self.arguments + self.outputs + self.temporaries


def liveness(f: Callable[..., Any], *args: Any, donate_argnums: int | Sequence[int] = ()) -> Liveness:
    """Estimate the memory of one call of `f` from the lives of the values in its jaxpr.

    The program is taken in the order in which it was traced. A value lives from the operation that makes it
    to the last that reads it. Arguments and results live all the time, as in a compiled program. These rules
    stand for what a compiler does:

    - A value that is made element by element is not stored where only such operations and reductions read it.
      What it is made of lives until then.
    - Reshapes and transposes are views.
    - An elementwise result, or a loop's carry, takes the place of an operand of its size that is read for the
      last time.
    - Calls are inlined, `jax.checkpoint` among them. A loop holds its carry, its stacked results and what one
      iteration needs.

    Args:
      f: a function of arrays.
      *args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
      donate_argnums: positions of the arguments that results may take the place of, as of `jax.jit`.

    Returns:
      Its `Liveness`.

    Raises:
      ValueError: `donate_argnums` names no argument.

    Source: GPU Memory and Utilization Estimation for Training-Aware Resource Management, 2026
    (arXiv 2602.17817), for estimators by tracing; the rules are our own.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((1000,), jnp.float32)
        >>> step = lambda x: jax.lax.scan(lambda c, _: (jnp.cumsum(c), None), x, length=5)[0]
        >>> frugax.planner.liveness(step, x, donate_argnums=0).outputs
        0
    """
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    sizes = [len(jax.tree.leaves(arg)) for arg in args]
    ends = list(accumulate(sizes, initial=0))
    argnums = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    for number in argnums:
        if not -len(args) <= number < len(args):
            raise ValueError(f"donate_argnums: got {number}; expected positions of {len(args)} arguments")
    donated = [leaf for n in argnums for leaf in range(ends[n % len(args)], ends[n % len(args) + 1])]
    free = [(v.aval.shape, v.aval.dtype) for v in (jaxpr.invars[i] for i in donated)]
    outputs = 0
    for v in jaxpr.outvars:
        kind = (v.aval.shape, v.aval.dtype)
        if kind in free:
            free.remove(kind)
        else:
            outputs += _bytes(v.aval)
    timeline = _timeline(jaxpr)
    return Liveness(
        arguments=sum(_bytes(v.aval) for v in [*jaxpr.invars, *jaxpr.constvars]),
        outputs=outputs,
        temporaries=max((held for _, held in timeline), default=0),
        timeline=tuple(timeline),
    )


class _Operation(NamedTuple):
    """An equation with calls inlined: operands and results are numbers of values."""

    name: str
    params: dict[str, Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]


class _Program(NamedTuple):
    """A flat program: operations in order, the type of each value, and what it takes and returns."""

    operations: list[_Operation]
    avals: list[Any]
    inputs: list[int]
    outputs: list[int]


def _flat(jaxpr: Jaxpr) -> _Program:
    avals: list[Any] = []
    operations: list[_Operation] = []

    def new(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def walk(jaxpr: Jaxpr, numbers: list[int]) -> list[int]:
        env = dict(zip(jaxpr.invars, numbers, strict=True))
        env |= {
            v: new(v.aval) for v in jaxpr.constvars
        }  # live in the program itself, not among its temporaries
        constant.update(env[v] for v in jaxpr.constvars)

        def read(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return env[atom]
            constant.add(number := new(atom.aval))
            return number

        def view(name: str, number: int, aval: Any) -> int:
            operations.append(_Operation(name, {}, (number,), (new(aval),)))
            return len(avals) - 1

        def once(params: dict[str, Any], operands: list[int]) -> list[int]:
            """A loop of one iteration is none."""
            body, (constants, carried) = opened(params["jaxpr"])[0], operand_counts(params)
            first = constants + carried
            slices = [
                view("squeeze", n, v.aval) for n, v in zip(operands[first:], body.invars[first:], strict=True)
            ]
            results = walk(body, operands[:first] + slices)
            stacked = [view("expand_dims", n, avals[n]) for n in results[carried:]]
            return results[:carried] + stacked

        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            operands = [read(a) for a in eqn.invars]
            if name in _CALLS:
                body = next(eqn.params[key] for key in _BODIES if key in eqn.params)
                results = walk(opened(body)[0], operands)
            elif name == "scan" and eqn.params["length"] == 1:
                results = once(eqn.params, operands)
            else:
                results = [new(v.aval) for v in eqn.outvars]
                operations.append(_Operation(name, eqn.params, tuple(operands), tuple(results)))
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    constant: set[int] = set()
    inputs = [new(v.aval) for v in jaxpr.invars]
    outputs = walk(jaxpr, inputs)
    return _Program(_needed(operations, outputs), avals, [*inputs, *sorted(constant)], outputs)


def _needed(operations: list[_Operation], outputs: list[int]) -> list[_Operation]:
    """Drop operations that no output depends on."""
    needed, kept = set(outputs), []
    for op in reversed(operations):
        if needed.intersection(op.results):
            needed.update(op.operands)
            kept.append(op)
    return kept[::-1]


def _timeline(jaxpr: Jaxpr) -> list[tuple[str, int]]:
    """Bytes of a jaxpr's temporaries while each operation runs; inputs and outputs are not its own."""
    program = _flat(jaxpr)
    sizes = [_bytes(aval) for aval in program.avals]
    readers = _readers(program.operations)
    kept = set(program.outputs)
    # The buffers that a value is made of: itself if it is stored, else those of its operands.
    buffers: dict[int, frozenset[int]] = {number: frozenset() for number in program.inputs}
    last: dict[int, int] = {}  # of each buffer the last operation that reads it
    for at, op in enumerate(program.operations):
        of_operands = frozenset().union(*(buffers[n] for n in op.operands))
        for number in of_operands:
            last[number] = at
        for number in op.results:
            view = op.name in _VIEWS
            fused = op.name in _ELEMENTWISE and readers.get(number, set()) <= _READERS
            if number in kept:
                buffers[number] = frozenset()  # among the outputs
            elif op.name == "optimization_barrier":
                buffers[number] = buffers[op.operands[op.results.index(number)]]
            else:
                buffers[number] = of_operands if view or fused else frozenset([number])
                last.setdefault(number, at)
    timeline: list[tuple[str, int]] = []
    held, live = 0, set[int]()
    for at, op in enumerate(program.operations):
        made = [n for n in op.results if buffers[n] == frozenset([n]) and n not in live]
        dying = sorted(sizes[n] for n in live if last[n] == at)
        inside = _body_bytes(op)
        if made or inside or kept.intersection(op.results):
            new = 0
            for number in made:
                size = sizes[number]
                if _in_place(op) and size in dying:
                    dying.remove(size)
                else:
                    new += size
            timeline.append((op.name, held + new + inside))
        live.update(made)
        live = {n for n in live if last[n] > at}
        held = sum(sizes[n] for n in live)
    return timeline


def _readers(operations: list[_Operation]) -> dict[int, set[str]]:
    """Names of the operations that read a value or a view of it."""
    readers: dict[int, set[str]] = {}
    for op in reversed(operations):
        names = set().union(*(readers.get(n, set()) for n in op.results)) if op.name in _VIEWS else {op.name}
        for number in op.operands:
            readers.setdefault(number, set()).update(names)
    return readers


def _in_place(op: _Operation) -> bool:
    return op.name in _READERS or op.name in ("scan", "while", "scatter", "scatter-add")


def _body_bytes(op: _Operation) -> int:
    """Bytes of temporaries inside a loop or a branch."""
    if op.name == "scan":
        body, (constants, carried) = opened(op.params["jaxpr"])[0], operand_counts(op.params)
        slices = sum(_bytes(v.aval) for v in body.invars[constants + carried :])
        stacked = sum(_bytes(v.aval) for v in body.outvars[carried:])
        return slices + stacked + _most(body)
    if op.name == "while":
        return max(_most(op.params[key]) for key in ("body_jaxpr", "cond_jaxpr"))
    if op.name == "cond":
        return max(_most(branch) for branch in op.params["branches"])
    if op.name == "shard_map":
        return _most(op.params["jaxpr"])
    return 0


def _most(jaxpr: Any) -> int:
    return max((held for _, held in _timeline(opened(jaxpr)[0])), default=0)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "dtype") else 0
