"""A function of params evaluated with leaves that are changed where they are read, layer by layer.

A changed copy of all params would double their memory. Here a stacked leaf that the function scans over is
changed one slice at a time, inside of the scan's body; another leaf is changed where it is first used.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Literal

CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
}

# (leaf's number, leaf or slice, place of its first number, arrays that are there at that time) -> changed
Read = Callable[[int, Array, Array | int, Sequence[Array]], Array]


class Unread(NamedTuple):
    """A leaf, or a slice of it, that is still as the caller gave it."""

    leaf: int
    value: Array
    start: Array | int  # the row-major place in the leaf of the slice's first number, modulo 2^32


# (operands, the scan's parameters, read) -> results
Scan = Callable[[Sequence[Any], dict[str, Any], Read], list[Any]]


def changed_where_read(fun: Callable[[Any], Any], params: Any, read: Read, scan: Scan | None = None) -> Any:
    """fun(params) with read(its number, x, 0, ...) in the place of each leaf x.

    Args:
      fun: params -> a tree of arrays.
      params: a tree of arrays.
      read: (number, x, start, after) -> changed x. x is the whole leaf, or the slice of one turn of a
        `lax.scan` over it; x's first number is number `start` of the leaf. `after` are the other operands of
        the operation that reads: what depends on them too is not computed long before.
      scan: evaluates a scan with `Unread` operands; None: the scan itself, with `read` in its body.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from frugax.optim.common.where_read import changed_where_read
        >>> loss = lambda w: jax.lax.scan(lambda h, x: (h * x, None), jnp.ones(2), w)[0].sum()
        >>> float(changed_where_read(loss, jnp.ones((3, 2)), lambda i, x, start, after: 2 * x))
        16.0
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(params)]
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(params)
    unread = [Unread(i, x, 0) for i, x in enumerate(leaves)]
    out = _evaluate(closed.jaxpr, closed.consts, unread, read, scan or scan_where_read)
    return jax.tree.unflatten(jax.tree.structure(shape), values(out, read))


def values(operands: Sequence[Any], read: Read) -> list[Any]:
    """Operands, read where they are unread."""
    ready = [x for x in operands if isinstance(x, jax.core.Tracer)]
    return [read(*x, ready) if isinstance(x, Unread) else x for x in operands]


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], read: Read, scan: Scan) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def look(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    for eqn in jaxpr.eqns:
        operands, name = [look(var) for var in eqn.invars], eqn.primitive.name
        unread = any(isinstance(x, Unread) for x in operands)
        if unread and name in CALLS:
            results = _evaluate(*opened(eqn.params[CALLS[name]]), operands, read, scan)
        elif unread and name == "scan":
            results = scan(operands, eqn.params, read)
        else:
            operands = values(operands, read)
            with eqn.ctx.manager:
                found = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            results = list(found) if eqn.primitive.multiple_results else [found]
        env.update(zip(eqn.outvars, results, strict=True))
    return [look(var) for var in jaxpr.outvars]


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, be it closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "jaxpr") else (jaxpr, getattr(jaxpr, "consts", ()))


def operand_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of a scan's operands that are constants, and that are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = (list(part) for part in params["ft_in"].unpack())  # jax 0.12
    return len(consts), len(carry)


def scan_where_read(operands: Sequence[Any], params: dict[str, Any], read: Read) -> list[Any]:
    """The same scan, with a body that reads slices of the leaves that are scanned over."""
    count, carried = operand_counts(params)
    carried += count
    before = values(operands[:carried], read)  # else each turn would change them again
    xs = operands[carried:]
    body, consts = opened(params["jaxpr"])

    def turn(carry, of_turn):
        step, each = of_turn
        slices = [
            Unread(x.leaf, value, x.start + step * jnp.uint32(value.size)) if isinstance(x, Unread) else value
            for x, value in zip(xs, each, strict=True)
        ]
        out = _evaluate(body, consts, [*before[:count], *carry, *slices], read, scan_where_read)
        out = values(out, read)
        return out[: len(carry)], out[len(carry) :]

    whole = [x.value if isinstance(x, Unread) else x for x in xs]
    steps = jnp.arange(params["length"], dtype=jnp.uint32)
    options = {k: params[k] for k in ("reverse", "unroll", "length")}
    carry, ys = lax.scan(turn, list(before[count:]), (steps, whole), **options)
    return [*carry, *ys]
