"""Floating-point operations of a program, counted in its jaxpr: loops, branches and kernels included."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


class Flops(NamedTuple):
    """Operations of all devices together, in matrix products and convolutions alone.

    Attributes:
      total: two for each product of two numbers that is added up.
      kernels: the part of it that Pallas kernels do.
      exact: False where a loop runs until data say so (it counts as one trip), or branches of a choice differ
        (the dearest counts).
    """

    total: int
    kernels: int
    exact: bool

    def times(self, n: int) -> "Flops":
        """The operations of `n` such programs."""
        return Flops(self.total * n, self.kernels * n, self.exact)


NOTHING = Flops(0, 0, True)


def flops(f: Callable[..., Any], *args: Any) -> Flops:
    """Count the operations of one call of `f`, without compiling it.

    XLA's own count takes a loop's body once and a kernel for nothing. Elementwise operations are left out, as
    from model FLOPs utilization. An operation of the library counts as its portable form does, whichever
    kernel serves it.

    Args:
      f: a function of arrays.
      *args: arrays or `jax.ShapeDtypeStruct`s, of global shapes.

    Returns:
      Its `Flops`.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> w = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
        >>> net = lambda w, x: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]
        >>> frugax.planner.flops(net, w, jnp.ones((2, 8))).total  # 3 layers of 2 * 2 * 8 * 8
        768
    """
    return _count(jax.make_jaxpr(f)(*args).jaxpr)


def _sum(parts: Iterator[Flops]) -> Flops:
    total = NOTHING
    for x in parts:
        total = Flops(total.total + x.total, total.kernels + x.kernels, total.exact and x.exact)
    return total


def _count(jaxpr: Jaxpr) -> Flops:
    return _sum(map(_of, jaxpr.eqns))


def _of(eqn: Any) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return Flops(
            2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted), 0, True
        )
    if name == "conv_general_dilated":
        out = params["dimension_numbers"].rhs_spec[0]
        rhs = eqn.invars[1].aval.shape
        return Flops(2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(rhs) // rhs[out], 0, True)
    if name == "ragged_dot_general":
        return _ragged(eqn)
    if name == "frugax_grouped_product":  # each row with one expert's matrix, forward and backward
        return Flops(2 * math.prod(eqn.invars[0].aval.shape) * eqn.outvars[0].aval.shape[-1], 0, True)
    if name == "frugax_kernel":
        structs = tuple((x.aval.shape, x.aval.dtype) for x in eqn.invars)
        portable = _portable(params["call"], structs)
        return Flops(portable.total, portable.total, portable.exact)
    bodies = list(_bodies(params))
    if name == "pallas_call":
        inside = _sum(map(_count, bodies)).times(
            math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
        )
        return Flops(inside.total, inside.total, inside.exact)
    if name == "cond":
        branches = [_count(body) for body in bodies]
        most = max(branches, key=lambda x: x.total)
        same = len({x.total for x in branches}) == 1
        return most._replace(exact=same and all(x.exact for x in branches))
    inside = _sum(map(_count, bodies))
    if name == "scan":
        return inside.times(params["length"])
    if name == "while":
        return inside._replace(exact=inside.exact and inside.total == 0)
    if name == "shard_map":  # shapes inside are of one device
        return inside.times(math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]))
    return inside


def _ragged(eqn: Any) -> Flops:
    """Every row of the left counts with one group's matrix, all rows taken as used."""
    lhs = eqn.invars[0].aval.shape
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    out = eqn.outvars[0].aval.shape
    if set(numbers.lhs_ragged_dimensions) & set(contracted):  # out [g, k, n], the groups share the rows
        return Flops(2 * math.prod(lhs) * out[-1], 0, True)
    return Flops(2 * math.prod(out) * math.prod(lhs[i] for i in contracted), 0, True)


@functools.lru_cache(maxsize=4096)
def _portable(call: Any, structs: tuple[Any, ...]) -> Flops:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in structs]
    return flops(functools.partial(call.run, None), *leaves)


def _bodies(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, Jaxpr):
                yield x
