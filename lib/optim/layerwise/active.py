"""Gradients of some layers of a stack alone: the others keep no activations for theirs.

A loss scans over stacked layers (`lax.scan`, `nn.scan`). Here that scan has a backward pass of its own. Of
every layer it keeps what the gradient of the hidden state needs, and of the active layers the hidden state
that they saw. From that an active layer is computed once more, when its weights' gradient is due.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Float, Int

from ...formats import QuantizedTensor, quantize
from ..common.matrix_spec import leaf_path
from ..common.where_read import (
    CALLS,
    Unread,
    changed_where_read,
    opened,
    operand_counts,
    scan_where_read,
    values,
)

LAYERS = r"(^|/)layers/"
DOTS = "dots"  # the name of a way to keep activations


def active_value_and_grad(
    loss_fn: Callable[[Any], Array],
    params: Any,
    active: Int[Array, "n"],
    *,
    layers: str = LAYERS,
    keep: str | None = None,
) -> tuple[Float[Array, ""], Any]:
    """The loss, and its gradient by the active layers and by all that is not stacked.

    Memory of frozen layers: no gradient, and no activations that only their weights' gradient would need.
    That holds where the loss scans over the stacked leaves; elsewhere the gradient is right and costs more.

    Args:
      loss_fn: params -> scalar.
      params: a tree; layers are the slices of axis 0 of the leaves that `layers` finds.
      active: indices of the layers, ascending and without repetition; may be traced.
      layers: regex of the paths of stacked leaves.
      keep: what is kept of all layers' activations. None: all that the hidden state's gradient needs, as they
        are. "dots": results of matrix products alone; what lies between them is computed again. Both are
        exact. Or a number format such as "int8" or "int4", in which they are stored with a scale for each row
        along their last axis.

    Returns:
      The loss and a tree like params, with leaves [n, ...] in the place of stacked ones.

    Raises:
      ValueError: `layers` finds nothing.

    Source: the freezing of LISA, Pan et al. 2024 (arXiv 2403.17919), of BAdam, Luo et al. 2024 (2404.02827),
    and of SlimFit, Ardakani et al. 2023 (2305.18513), as a backward pass of static shapes.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> params = {"layers": {"w": jnp.ones((4, 3, 3)) / 3}, "x": jnp.ones(3)}
        >>> def loss(p):
        ...     return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), p["x"], p["layers"]["w"])[0].sum()
        >>> value, gradient = frugax.optim.active_value_and_grad(loss, params, jnp.array([1, 3]))
        >>> exact = jax.grad(loss)(params)["layers"]["w"][jnp.array([1, 3])]
        >>> bool(jnp.allclose(gradient["layers"]["w"], exact)), gradient["x"].shape
        (True, (3,))
    """
    leaves, tree = _flat(params)
    stacked = [i for i, is_one in enumerate(is_stacked(params, layers)) if is_one]
    others = [i for i in range(len(leaves)) if i not in stacked]

    def loss(slots: list[Array], rest: list[Array]) -> Array:
        given, trained = list(leaves), dict(zip(stacked, slots, strict=True))
        for i, x in zip(others, rest, strict=True):
            given[i] = x

        def read(i: int, x: Array, start: Any, after: Sequence[Array]) -> Array:
            return x.at[active].set(trained[i]) if i in trained else x

        def scan(operands, of_scan, read):
            return _scan(operands, of_scan, read, trained, active, keep)

        return changed_where_read(loss_fn, tree.unflatten(given), read, scan)

    slots, rest = take_layers(leaves, stacked, active), [leaves[i] for i in others]
    value, (of_slots, of_rest) = jax.value_and_grad(loss, argnums=(0, 1))(slots, rest)
    gradient = dict(zip([*stacked, *others], [*of_slots, *of_rest], strict=True))
    return value, tree.unflatten([gradient[i] for i in range(len(leaves))])


def is_stacked(params: Any, layers: str) -> list[bool]:
    """Find the leaves with layers along axis 0, in the tree's order."""
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = [re.search(layers, path) is not None for path in paths]
    if not any(found):
        raise ValueError(f"layers: {layers!r} matches no leaf; expected one of {', '.join(paths)}")
    return found


def take_layers(leaves: Sequence[Array], which: Sequence[int], active: Array) -> list[Array]:
    """Layers `active` of the leaves numbered `which`."""
    return [jnp.take(leaves[i], active, axis=0, unique_indices=True) for i in which]


def _flat(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


class _Plan(NamedTuple):
    """The static parts of a layer's pullback by hidden state and constants."""

    forward: Any  # (constants, weights, hidden, others) -> (outputs, residuals), as a closed jaxpr
    outputs: int
    pullback: Any  # the tree of the residuals
    kept: tuple[bool, ...]  # of residuals: depends on the hidden state; the others are found again


def _scan(
    operands: Sequence[Any],
    of_scan: dict[str, Any],
    read: Any,
    slots: dict[int, Array],
    active: Array,
    keep: str | None,
) -> list[Any]:
    """A scan over layers with the backward pass that this module is about."""
    count, carried = operand_counts(of_scan)
    if not any(isinstance(x, Unread) and x.leaf in slots for x in operands[count + carried :]):
        return scan_where_read(operands, of_scan, read)  # over something else, such as time
    constants = list(map(jnp.asarray, values(operands[:count], read)))
    hidden = list(map(jnp.asarray, values(operands[count : count + carried], read)))
    xs = [
        x.value if isinstance(x, Unread) and x.leaf not in slots else x for x in operands[count + carried :]
    ]
    trained = [i for i, x in enumerate(xs) if isinstance(x, Unread)]
    others = [x for x in xs if not isinstance(x, Unread)]
    weights = [xs[i].value for i in trained]
    length, reverse = of_scan["length"], of_scan["reverse"]
    function = _callable(of_scan["jaxpr"])

    def body(constants, weights, hidden, others):
        merged, rest, own = [], iter(others), iter(weights)
        for i in range(len(xs)):
            merged.append(next(own) if i in trained else next(rest))
        out = function(*constants, *hidden, *merged)
        return out[: len(hidden)], out[len(hidden) :]

    run = _with_backward_pass(body, length, reverse, keep)
    place = jnp.full(length, len(active)).at[active].set(jnp.arange(len(active)))
    hidden, ys = run([slots[xs[i].leaf] for i in trained], constants, hidden, others, weights, place)
    return [*hidden, *ys]


def _callable(jaxpr: Any) -> Callable[..., list[Any]]:
    inner, consts = opened(jaxpr)
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr_as_fun(jaxpr)
    return lambda *args: jax.core.eval_jaxpr(inner, consts, *args)


def _with_backward_pass(body: Any, length: int, reverse: bool, keep: str | None) -> Any:
    """(slots, constants, hidden, others, weights, place of each layer in slots) -> the scan's results.

    `slots` are the active layers' weights: what they get is the gradient, what runs are `weights`.
    """
    static: dict[str, Any] = {}

    @jax.custom_vjp
    def run(slots, constants, hidden, others, weights, place):
        return lax.scan(
            lambda h, x: body(constants, x[0], h, x[1]), hidden, (weights, others), length, reverse
        )

    def forward(slots, constants, hidden, others, weights, place):
        wants = [[x.perturbed for x in part] for part in (constants, others)]
        constants, hidden, others, weights = (
            [x.value for x in part] for part in (constants, hidden, others, weights)
        )
        slots, place = [x.value for x in slots], place.value
        plan = _plan(body, constants, _first(weights), hidden, _first(others), wants, keep)
        static.update(plan=plan, wants=wants)
        seen = [jnp.stack([h] * len(slots[0])) for h in hidden]

        def turn(carry, of_turn):
            hidden, seen = carry
            weights, others, here = of_turn
            seen = [s.at[here].set(h, mode="drop") for s, h in zip(seen, hidden, strict=True)]
            out = jaxpr_as_fun(plan.forward)(*constants, *weights, *hidden, *others)
            outputs, residuals = out[: plan.outputs], out[plan.outputs :]
            stored = [_store(r, keep) for r, is_kept in zip(residuals, plan.kept, strict=True) if is_kept]
            return (outputs[: len(hidden)], seen), (outputs[len(hidden) :], stored)

        (out, seen), (ys, stored) = lax.scan(
            turn, (list(hidden), seen), (weights, others, place), length, reverse
        )
        return (out, ys), (slots, constants, others, weights, place, seen, stored)

    def backward(kept, cotangents):
        slots, constants, others, weights, place, seen, stored = kept
        plan, wants = static["plan"], static["wants"]
        of_hidden, of_ys = jax.tree.map(_whole, cotangents, is_leaf=lambda x: isinstance(x, SymbolicZero))
        blank = [h[0] for h in seen]
        of_constants = [jnp.zeros_like(x) for x, want in zip(constants, wants[0], strict=True) if want]
        of_slots = [jnp.zeros_like(x) for x in slots]

        def turn(carry, of_turn):
            of_hidden, of_constants, of_slots = carry
            weights, others, here, stored, of_ys = of_turn
            # What depends on weights and constants alone was not stored; XLA drops the rest of this call.
            again = jaxpr_as_fun(plan.forward)(*constants, *weights, *blank, *others)[plan.outputs :]
            own = iter(stored)
            residuals = [
                _restore(next(own)) if is_kept else r for r, is_kept in zip(again, plan.kept, strict=True)
            ]
            pullback = jax.tree.unflatten(plan.pullback, residuals)
            outward = (*of_hidden, *of_ys)
            more, below, of_others = pullback(tuple(x for x in outward if _is_float(x)))

            def train(of_slots):
                inputs = [h[here] for h in seen]
                _, pull = jax.vjp(lambda w: _floats(body(constants, w, inputs, others)), weights)
                (found,) = pull(tuple(x for x in outward if _is_float(x)))
                return [s.at[here].set(g) for s, g in zip(of_slots, found, strict=True)]

            of_slots = lax.cond(here < len(slots[0]), train, lambda x: x, of_slots)
            of_constants = [a + b for a, b in zip(of_constants, more, strict=True)]
            own = iter(below)
            below = [next(own) if _is_float(x) else x for x in of_hidden]
            return (below, of_constants, of_slots), of_others

        (of_hidden, of_constants, of_slots), of_others = lax.scan(
            turn,
            (list(of_hidden), of_constants, of_slots),
            (weights, others, place, stored, of_ys),
            length,
            not reverse,
        )
        nothing = [None] * len(weights)
        of_hidden = [x if _is_float(x) else None for x in of_hidden]
        return (
            of_slots,
            _spread(of_constants, wants[0]),
            of_hidden,
            _spread(of_others, wants[1]),
            nothing,
            None,
        )

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _plan(
    body: Any, constants: Any, weights: Any, hidden: Any, others: Any, wants: Any, keep: str | None
) -> _Plan:
    """Trace a layer with its pullback by hidden state, and by the constants and others that want it."""
    shapes = [len(part) for part in (constants, weights, hidden, others)]
    tree = []

    def forward(*flat):
        constants, weights, hidden, others = _cut(flat, shapes)

        def floats(some_constants, some_hidden, some_others):
            out = body(
                _merged(constants, some_constants, wants[0]),
                weights,
                _merged(hidden, some_hidden, [_is_float(x) for x in hidden]),
                _merged(others, some_others, wants[1]),
            )
            return _floats(out), [*out[0], *out[1]]

        chosen = [x for x, want in zip(constants, wants[0], strict=True) if want]
        chosen_others = [x for x, want in zip(others, wants[1], strict=True) if want]
        moving = [x for x in hidden if _is_float(x)]
        if keep == DOTS:
            policy = jax.checkpoint_policies.dots_saveable
            floats = jax.checkpoint(floats, prevent_cse=False, policy=policy)
        _, pullback, outputs = jax.vjp(floats, chosen, moving, chosen_others, has_aux=True)
        residuals, structure = jax.tree.flatten(pullback)
        tree.append((structure, len(outputs)))
        return [*outputs, *residuals]

    closed = jax.make_jaxpr(forward)(*constants, *weights, *hidden, *others)
    structure, outputs = tree[-1]
    start = shapes[0] + shapes[1]
    of_hidden = [start <= i < start + shapes[2] for i in range(sum(shapes))]
    depends = _depends(closed.jaxpr, of_hidden)
    return _Plan(closed, outputs, structure, tuple(depends[outputs:]))


def _depends(jaxpr: Any, of_inputs: Sequence[bool]) -> list[bool]:
    """Find for each output of a jaxpr whether it depends on a marked input."""
    marked = {v for v, is_one in zip(jaxpr.invars, of_inputs, strict=True) if is_one}

    def look(v: Any) -> bool:
        return not hasattr(v, "val") and v in marked

    for eqn in jaxpr.eqns:
        ins = [look(v) for v in eqn.invars]
        name = eqn.primitive.name
        outs = [any(ins)] * len(eqn.outvars)
        if name in CALLS and any(ins):
            outs = _depends(opened(eqn.params[CALLS[name]])[0], ins)
        marked |= {v for v, is_one in zip(eqn.outvars, outs, strict=True) if is_one}
    return [look(v) for v in jaxpr.outvars]


def _store(x: Array, keep: str | None) -> Any:
    if keep in (None, DOTS) or not _is_float(x) or x.ndim == 0 or x.size == 0:
        return x
    return (quantize(x, keep, axis=-1), jnp.zeros((), x.dtype))


def _restore(stored: Any) -> Array:
    if isinstance(stored, tuple) and isinstance(stored[0], QuantizedTensor):
        return stored[0].dequantize(stored[1].dtype)
    return stored


def _first(stacked: Sequence[Array]) -> list[Array]:
    return [x[0] for x in stacked]


def _cut(flat: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(flat[start : start + size]))
        start += size
    return parts


def _merged(whole: Sequence[Any], some: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    own = iter(some)
    return [next(own) if is_one else x for x, is_one in zip(whole, which, strict=True)]


def _spread(some: Sequence[Any], which: Sequence[bool]) -> list[Any]:
    own = iter(some)
    return [next(own) if is_one else None for is_one in which]


def _floats(out: tuple[Sequence[Any], Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(x for x in (*out[0], *out[1]) if _is_float(x))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _whole(x: Any) -> Any:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
