"""The way of tokens to their experts and back, three ways with the same result where nothing is dropped."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from .routing import Routing, tokens_an_expert
from .soft import SoftRouting

Method = Literal["sort", "gather", "einsum"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchPlan:
    """The places that tokens went to, for `combine`, and how many were dropped.

    Attributes:
      group_sizes: rows of each expert, int32 [E].
      dropped: the share of assignments that found no place.
      tokens: how many there are.
      method: "sort", "gather", "einsum" or "soft".
      to: what the method needs to send tokens, and
      back: to bring them back.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.softmax_top_k(jnp.zeros((4, 2)), 1)  # all choose the first
        >>> _, plan = frugax.moe.dispatch(jnp.ones((4, 3)), routing, method="gather", capacity=3)
        >>> plan.group_sizes.tolist(), float(plan.dropped)
        ([3, 0], 0.25)
    """

    group_sizes: Any
    dropped: Any
    to: Any
    back: Any
    tokens: int = dataclasses.field(metadata=dict(static=True))
    method: str = dataclasses.field(metadata=dict(static=True))


def dispatch(
    x: Float[Array, "t d"],
    routing: Routing | SoftRouting,
    *,
    method: Method = "sort",
    capacity: int | float | None = None,
    key: Key[Array, ""] | None = None,
    order: Int[Array, "n"] | None = None,
) -> tuple[Float[Array, "... d"], DispatchPlan]:
    """Gather the tokens of each expert.

    Args:
      x: tokens.
      routing: from a router. Assignments with weight 0 take no place.
      method: "sort" drops nothing: rows [n, D] in the order of experts, n = T * k, for
        `frugax.kernels.grouped_matmul` with the plan's `group_sizes`; rows past their sum are zero. "gather"
        and "einsum": [E, C, D], where assignments over an expert's capacity C are dropped and free places
        are zero. "einsum" is the definition by one-hot arrays [T, E, C]. A `SoftRouting` has its own method.
      capacity: C as a number, or as a float a factor of the mean number of assignments, rounded up. None with
        "gather" and "einsum": all tokens.
      key: None drops the last tokens, the second choices before the first. A key drops any, so that a
        token's place has no part in it (random token selection), among assignments of the same rank.
      order: a number for each assignment, in place of a key: those with the highest of a rank are dropped.

    Returns:
      What experts read, and the plan for `combine`.

    Raises:
      ValueError: an argument can't be right; the message names it.

    Source: Lepikhin et al. 2020, GShard (arXiv 2006.16668); Gale et al. 2022, MegaBlocks (2211.15841) for
    "sort"; Kim et al. 2021, DeepSpeed MoE (2109.10465) for random token selection.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (6, 4))
        >>> routing = frugax.moe.softmax_top_k(x[:, :3], 2)
        >>> rows, plan = frugax.moe.dispatch(x, routing)
        >>> rows.shape, int(plan.group_sizes.sum())
        ((12, 4), 12)
        >>> bool(jnp.allclose(frugax.moe.combine(rows, plan), x, atol=1e-6))  # experts that do nothing
        True
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x: got {x.dtype}{list(x.shape)}; expected floats [tokens, width]")
    if isinstance(routing, SoftRouting):
        _check_tokens(x, routing.into.shape[0])
        share = routing.into.astype(jnp.float32)
        rows = jnp.einsum("tes,td->esd", share, x.astype(jnp.float32)).astype(x.dtype)
        slots = jnp.full(share.shape[1], share.shape[2], jnp.int32)
        return rows, DispatchPlan(slots, jnp.zeros(()), (), routing.out, x.shape[0], "soft")
    if method not in get_args(Method):
        raise ValueError(f"method: got {method!r}; expected one of {', '.join(get_args(Method))}")
    if routing.by == "token":
        _check_tokens(x, routing.indices.shape[0])
    if method == "sort":
        if capacity is not None:
            raise ValueError(f"capacity: got {capacity} with method='sort'; expected None, it drops nothing")
        return _sorted(x, routing)
    C = _capacity(capacity, x.shape[0], routing)
    tokens, experts, weights = routing.assignments()
    place, taken, dropped = _taken(routing, C, key, order)
    sizes = jnp.zeros(routing.experts, jnp.int32).at[experts].add(taken.astype(jnp.int32))
    if method == "gather":
        # A place's assignment; n where it is free.
        n = tokens.shape[0]
        at = jnp.where(taken, experts * C + place, routing.experts * C)
        of = (
            jnp.full(routing.experts * C, n, jnp.int32)
            .at[at]
            .set(jnp.arange(n, dtype=jnp.int32), mode="drop")
        )
        token = jnp.append(tokens, x.shape[0])[of]
        rows = x.at[token].get(mode="fill", fill_value=0).reshape(routing.experts, C, -1)
        plan = DispatchPlan(
            sizes, dropped, token, (at, jnp.where(taken, weights, 0.0), tokens), x.shape[0], "gather"
        )
        return rows, plan
    mask = _one_hot(tokens, experts, jnp.where(taken, place, C), (x.shape[0], routing.experts, C))
    rows = _product("ntec,td->ecd", mask, x.astype(jnp.float32)).astype(x.dtype)
    back = jnp.sum(jnp.where(mask != 0, weights.reshape(-1, 1, 1, 1), 0), axis=0)
    return rows, DispatchPlan(sizes, dropped, mask, back, x.shape[0], "einsum")


def combine(y: Float[Array, "... d"], plan: DispatchPlan) -> Float[Array, "t d"]:
    """Add up what experts made of each token, times the weights.

    Args:
      y: rows as `dispatch` gave them; their width may be another.
      plan: of the same call.

    Returns:
      [T, D] in y's dtype, summed in float32; zero for tokens that no expert saw.

    Raises:
      ValueError: y has not the plan's rows.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.softmax_top_k(jnp.array([[1.0, 0.0], [0.0, 1.0]]), 1)
        >>> rows, plan = frugax.moe.dispatch(jnp.array([[1.0], [2.0]]), routing, method="gather", capacity=1)
        >>> frugax.moe.combine(10 * rows, plan).tolist()
        [[10.0], [20.0]]
    """
    wide = y.astype(jnp.float32)
    if plan.method in ("soft", "einsum"):
        _check_rows(y, plan.back.shape[1:])
        return _product("tec,ecd->td", plan.back, wide).astype(y.dtype)
    if plan.method == "gather":
        at, weights, tokens = plan.back
        _check_rows(y, (plan.group_sizes.shape[0], plan.to.shape[0] // plan.group_sizes.shape[0]))
        flat = wide.reshape(-1, y.shape[-1])
        mine = flat.at[at].get(mode="fill", fill_value=0)
        return _sum(mine, weights, tokens, plan.tokens).astype(y.dtype)
    order, inverse = plan.to
    weights, tokens = plan.back
    _check_rows(y, (order.shape[0],))
    real = jnp.arange(order.shape[0]) < jnp.sum(plan.group_sizes)
    mine = _permuted(jnp.where(real[:, None], wide, 0.0), inverse, order)
    return _sum(mine, weights, tokens, plan.tokens).astype(y.dtype)


def _product(axes: str, weights: Array, x: Array) -> Array:
    """The einsum of weights and rows x, where a row that is not finite spoils only what gives it a weight."""
    bad = jnp.any(~jnp.isfinite(x), axis=-1, keepdims=True)
    spoiled = jnp.einsum(axes, (weights != 0).astype(x.dtype), bad.astype(x.dtype)) > 0
    return jnp.where(spoiled, jnp.nan, jnp.einsum(axes, weights, jnp.where(bad, 0, x)))


def by_expert(routing: Routing) -> tuple[Int[Array, "n"], Int[Array, "n"], Int[Array, "e"]]:
    """Sort assignments by expert, those of weight 0 last: the order, its inverse, assignments of experts."""
    _, experts, weights = routing.assignments()
    sent = weights != 0
    order = jnp.argsort(jnp.where(sent, experts, routing.experts), stable=True)
    inverse = (
        jnp.zeros_like(order)
        .at[order]
        .set(jnp.arange(order.shape[0], dtype=order.dtype), unique_indices=True)
    )
    sizes = jnp.zeros(routing.experts, jnp.int32).at[experts].add(sent.astype(jnp.int32))
    return order, inverse, sizes


def _sorted(x: Array, routing: Routing) -> tuple[Array, DispatchPlan]:
    tokens, _, weights = routing.assignments()
    sent = weights != 0
    order, inverse, sizes = by_expert(routing)
    if routing.by == "token":
        k = routing.indices.shape[1]
        each = jnp.broadcast_to(x[:, None], (x.shape[0], k, x.shape[1])).reshape(-1, x.shape[1])
    else:
        each = x[tokens]
    rows = _permuted(jnp.where(sent[:, None], each, 0), order, inverse)
    # Where tokens choose, assignments stand by token: no scatter brings them back.
    back = weights, None if routing.by == "token" else tokens
    return rows, DispatchPlan(sizes, jnp.zeros(()), (order, inverse), back, x.shape[0], "sort")


def _sum(y: Array, weights: Array, tokens: Array | None, count: int) -> Array:
    """Add weighted rows [n, D] up by token; None: each token has the same number of neighbouring rows."""
    y = jnp.where(weights[:, None] != 0, y * weights[:, None], 0.0)
    if tokens is None:
        return jnp.sum(y.reshape(count, -1, y.shape[-1]), 1)
    return jnp.zeros((count, y.shape[-1]), y.dtype).at[tokens].add(y)


@jax.custom_vjp
def _permuted(x: Array, order: Array, inverse: Array) -> Array:
    """x[order]; its gradient is taken by the inverse, which is a gather where JAX would scatter."""
    return x[order]


def _permuted_forward(x, order, inverse):
    return x[order], (order, inverse)


def _permuted_backward(kept, dy):
    order, inverse = kept
    none = np.zeros(order.shape, jax.dtypes.float0)
    return dy[inverse], none, none


_permuted.defvjp(_permuted_forward, _permuted_backward)


def limited(
    routing: Routing,
    tokens: int,
    *,
    capacity: int | float | None,
    order: Int[Array, "n"] | None = None,
) -> tuple[Routing, Float[Array, ""]]:
    """Drop what `dispatch` drops of so many tokens, by weights of 0; and the share that was dropped."""
    _, taken, dropped = _taken(routing, _capacity(capacity, tokens, routing), None, order)
    weights = jnp.where(taken.reshape(routing.weights.shape), routing.weights, 0.0)
    return dataclasses.replace(routing, weights=weights), dropped


def _taken(routing: Routing, capacity: int, key: Array | None, order: Array | None) -> tuple[Array, ...]:
    """Places of assignments, which of them are below the capacity, and the share of the others."""
    weights, place = routing.weights.reshape(-1), places(routing, key, order)
    taken = (weights != 0) & (place < capacity)
    return place, taken, 1 - jnp.sum(taken) / jnp.maximum(jnp.sum(weights != 0), 1)


def places(
    routing: Routing, key: Key[Array, ""] | None = None, order: Int[Array, "n"] | None = None
) -> Int[Array, "n"]:
    """Number each expert's assignments, first choices before second ones; key, order as in `dispatch`."""
    _, experts, weights = routing.assignments()
    n, k = experts.shape[0], routing.indices.shape[1] if routing.by == "token" else 1
    rank = jnp.arange(n) % k  # first choices before second ones
    if order is not None and (key is not None or order.shape != (n,)):
        got = f"{list(order.shape)}{' and a key' * (key is not None)}"
        raise ValueError(f"order: got {got}; expected [{n}], one for each assignment, or a key alone")
    if order is None:
        order = jnp.arange(n) if key is None else jax.random.permutation(key, n)
    order = jnp.lexsort((order, rank))
    sent = (weights != 0)[order]
    mine = jax.nn.one_hot(experts[order], routing.experts, dtype=jnp.int32) * sent[:, None].astype(jnp.int32)
    place = jnp.sum((jnp.cumsum(mine, 0, dtype=jnp.int32) - mine) * mine, -1, dtype=jnp.int32)
    return jnp.zeros(n, jnp.int32).at[order].set(place, unique_indices=True)


def _capacity(capacity: int | float | None, tokens: int, routing: Routing) -> int:
    if capacity is None:
        return tokens
    return min(tokens_an_expert(capacity, routing.indices.size / routing.experts), tokens)


def _one_hot(tokens, experts, places, shape) -> Array:
    """[n, T, E, C]: one where an assignment has its place."""
    hot = (jax.nn.one_hot(i, size) for i, size in zip((tokens, experts, places), shape, strict=True))
    t, e, c = hot
    return t[:, :, None, None] * e[:, None, :, None] * c[:, None, None, :]


def _check_tokens(x: Array, tokens: int) -> None:
    if x.shape[0] != tokens:
        raise ValueError(f"x: got {list(x.shape)}; expected the {tokens} tokens that were routed")


def _check_rows(y: Array, rows: tuple[int, ...]) -> None:
    if y.shape[:-1] != tuple(rows):
        raise ValueError(f"y: got {list(y.shape)}; expected {[*rows]} rows, as dispatch gave them")
