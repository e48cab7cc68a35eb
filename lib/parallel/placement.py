"""Fully sharded sparse data parallelism: copies of busy experts on other devices, chosen in each step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..kernels.common.sharding import vary_like
from ..moe.dispatch import places
from ..moe.routing import Routing
from .exchange import AxisNames, Transport, exchange, moved
from .experts import ExpertLoad, Experts, as_tuple, check_experts, expert_parallel


def plan_placement(
    load: Float[Array, "e"] | Int[Array, "e"], *, devices: int, slots: int, per_pair: int | None = None
) -> Int[Array, "p s"]:
    """Choose the experts that each device gets a copy of, so that the busiest device has fewer tokens.

    Holders of an expert share its tokens evenly. As long as it helps, one of the busiest device's experts is
    copied to another device: the pair of them that leaves the fewest tokens to the busier of the two.

    Args:
      load: tokens of each of the E experts, as they are expected: of the step before, or a mean of several.
      devices: P; each owns E / P neighbouring experts.
      slots: copies that a device has room for.
      per_pair: the most copies that a device sends to another. It bounds what a padded exchange moves. None:
        as many as there can be.

    Returns:
      The experts that each device gets; -1 where a slot stays free.

    Raises:
      ValueError: an argument can't be right; the message names it.

    Source: Qing et al. 2025, Hecate (arXiv 2502.02581), for the problem; the greedy rule is our own.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> load = jnp.array([8.0, 0.0, 1.0, 1.0])  # of two devices the first has 8, the second 2
        >>> frugax.parallel.plan_placement(load, devices=2, slots=1).tolist()  # then 4.5 and 5.5
        [[2], [0]]
    """
    E, P = len(load), devices
    if devices < 1 or E % devices:
        raise ValueError(f"load: got {E} experts; expected a multiple of {devices}, the devices")
    limit = _per_pair(per_pair, slots, E // P)
    owner = jnp.arange(E) // (E // P)
    load = load.astype(jnp.float32)

    def step(_, state):
        held, copies, sent = state
        share = load / jnp.sum(held, 1)
        rows = share @ held
        busiest = jnp.argmax(rows)
        used = jnp.sum(copies >= 0, 1)
        free = held[:, busiest, None] & ~held & (used < slots)[None] & (sent[owner] < limit)  # [E, P]
        less = load / (jnp.sum(held, 1) + 1)
        worse = jnp.maximum(rows[None] + less[:, None], (rows[busiest] - share + less)[:, None])
        worse = jnp.where(free, worse, jnp.inf)
        e, d = jnp.unravel_index(jnp.argmin(worse), worse.shape)
        better = worse[e, d] < rows[busiest]
        slot = jnp.where(better, used[d], slots)  # out of bounds: nothing is written
        return (
            held.at[e, d].set(held[e, d] | better),
            copies.at[d, slot].set(e.astype(jnp.int32), mode="drop"),
            sent.at[owner[e], d].add(better.astype(jnp.int32)),
        )

    held, copies = owner[:, None] == jnp.arange(P)[None], jnp.full((P, slots), -1, jnp.int32)
    start = [vary_like(x, load) for x in (held, copies, jnp.zeros((P, P), jnp.int32))]
    return jax.lax.fori_loop(0, P * slots, step, tuple(start))[1]


def expert_parallel_with_copies(
    x: Float[Array, "t d"],
    routing: Routing,
    experts: Experts,
    params: Any,
    copies: Int[Array, "p s"],
    *,
    axis_name: AxisNames,
    token_axes: AxisNames | None = None,
    tensor_axis: AxisNames = (),
    per_pair: int | None = None,
    node: int = 1,
    rematerialize: bool = False,
    transport: Transport | None = None,
) -> tuple[Float[Array, "t d2"], ExpertLoad]:
    """Apply experts as `expert_parallel` does, some of them copied to other devices for this call alone.

    Params, gradients and the state of an optimizer stay where they are, each on one device. A sparse gather
    brings the chosen experts, and its transpose, a sparse sum, returns the gradients of copies to the owner.
    Outputs and gradients are those without copies, for any `copies`; nothing is compiled anew where they
    change. Nothing is dropped.

    Args:
      x, routing, experts, params, axis_name, token_axes, tensor_axis, transport: as in `expert_parallel`.
      copies: the same on every device, as from `plan_placement`. What can't be is left out: experts that a
        device owns or gets twice, and those over `per_pair`.
      per_pair: as in `plan_placement`.
      node: neighbouring devices of the axis with a fast network between them. A token goes to the device that
        it is on if that holds its expert, else to holders in its node if there are any, else to all others.
      rematerialize: gather copies and apply experts again for the backward pass; what is kept for it is the
        tokens that came.

    Raises:
      ValueError: an argument can't be right; the message names it.

    Source: Qing et al. 2025, Hecate (arXiv 2502.02581).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
        >>> experts = lambda w, rows, sizes: jax.lax.ragged_dot(rows, w, sizes)
        >>> def layer(x, w):
        ...     routing = frugax.moe.softmax_top_k(x[:, :2], 2)
        ...     load = jax.lax.psum(routing.statistics.load, "data")
        ...     copies = frugax.parallel.plan_placement(load, devices=1, slots=1)
        ...     return frugax.parallel.expert_parallel_with_copies(
        ...         x, routing, experts, w, copies, axis_name="data")
        >>> split = P("data")
        >>> layer = jax.shard_map(layer, mesh=mesh, in_specs=(split, split), out_specs=(split, P()))
        >>> y, load = jax.jit(layer)(jnp.ones((6, 4)), jnp.ones((2, 4, 3)))
        >>> y.shape, load.tokens.tolist()
        ((6, 3), [6, 6])
    """
    devices = jax.lax.axis_size(axis_name)
    check_experts(routing, params, devices, as_tuple(axis_name))
    if len(copies) != devices:
        raise ValueError(f"copies: got {list(copies.shape)}; expected a row for each of {devices} devices")
    own = routing.experts // devices
    limit = _per_pair(per_pair, copies.shape[1], own)
    copies = _possible(copies, own, limit)
    sent = route_to_copies(routing, copies, jax.lax.axis_index(axis_name), node=node)

    def apply(params, copies, rows, sizes):
        return experts(_with_copies(params, copies, own, limit, axis_name, transport), rows, sizes)

    if rematerialize:
        apply = jax.checkpoint(apply)
    y, load = expert_parallel(
        x,
        sent,
        lambda _, rows, sizes: apply(params, copies, rows, sizes),
        (),
        axis_name=axis_name,
        token_axes=token_axes,
        tensor_axis=tensor_axis,
        transport=transport,
    )
    ids = jnp.concatenate([jnp.arange(routing.experts, dtype=jnp.int32).reshape(devices, own), copies], 1)
    ids = jnp.where(ids < 0, routing.experts, ids).reshape(-1)
    tokens = jnp.zeros(routing.experts, jnp.int32).at[ids].add(load.tokens, mode="drop")
    return y, load._replace(tokens=tokens)


def route_to_copies(
    routing: Routing, copies: Int[Array, "p s"], device: int | Int[Array, ""], *, node: int = 1
) -> Routing:
    """Choose for each assignment the nearest device with its expert, in turn where several are as near.

    Args:
      routing: of the tokens of one device.
      copies: of each device, valid ones or -1.
      device: of these tokens.
      node: as in `expert_parallel_with_copies`.

    Returns:
      The routing to P * (E / P + S) experts: of each device first those that it owns, then its slots.

    Raises:
      ValueError: experts choose, or numbers do not divide.

    Source: Qing et al. 2025, Hecate (arXiv 2502.02581).

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> routing = frugax.moe.softmax_top_k(jnp.array([[1.0, 0.0], [0.0, 1.0]]), 1)
        >>> copies = jnp.array([[-1], [0]])  # the second device has a copy of the first's expert
        >>> frugax.parallel.route_to_copies(routing, copies, 1).indices[:, 0].tolist()
        [3, 2]
    """
    P, S = copies.shape
    E, own = routing.experts, routing.experts // P
    if routing.by != "token":
        raise ValueError("routing: got one where experts choose; expected one where tokens choose")
    if node < 1 or P % node:
        raise ValueError(f"node: got {node}; expected a divisor of {P}, the number of devices")
    expert, every = jnp.arange(E), jnp.arange(P)
    # The number of an expert on a device, of own + S; -1: it is not there.
    slot = jnp.where(expert[:, None] // own == every[None], expert[:, None] % own, -1)
    slot = slot.at[jnp.where(copies < 0, E, copies), every[:, None]].set(
        own + jnp.arange(S)[None], mode="drop"
    )
    held = slot >= 0
    here = held & (every == device)[None]
    near = held & (every // node == device // node)[None]
    held = jnp.where(here.any(1, keepdims=True), here, jnp.where(near.any(1, keepdims=True), near, held))
    turn = places(routing).reshape(routing.indices.shape) + device  # devices start at different holders
    nth = turn % jnp.sum(held, 1)[routing.indices]
    rank = jnp.cumsum(held, 1) - 1
    holder = jnp.zeros((E, P), jnp.int32)
    holder = holder.at[expert[:, None], jnp.where(held, rank, P)].set(
        every.astype(jnp.int32)[None], mode="drop"
    )
    to = holder[routing.indices, nth]
    indices = to * (own + S) + slot[routing.indices, to]
    return dataclasses.replace(routing, indices=indices.astype(jnp.int32), experts=P * (own + S))


def _per_pair(per_pair: int | None, slots: int, own: int) -> int:
    if slots < 1:
        raise ValueError(f"slots: got {slots}; expected at least 1")
    if per_pair is not None and per_pair < 1:
        raise ValueError(f"per_pair: got {per_pair}; expected at least 1")
    return min(slots, own, per_pair or own)


def _nth_of_pair(copies: Array, own: int) -> Array:
    """Each copy's number among those that its device gets from the same owner, [P, S]."""
    owner = copies // own  # -1 where a slot is free
    same = owner[:, :, None] == owner[:, None, :]
    return jnp.sum(jnp.tril(same, -1), 2)


def _possible(copies: Array, own: int, limit: int) -> Array:
    """Copies without those of experts that a device has already, and those over the limit of a pair."""
    P = len(copies)
    twice = jnp.tril(copies[:, :, None] == copies[:, None, :], -1).any(2)
    owned = copies // own == jnp.arange(P)[:, None]
    known = (copies >= 0) & (copies < P * own)
    copies = jnp.where(known & ~owned & ~twice, copies, -1).astype(jnp.int32)
    return jnp.where(_nth_of_pair(copies, own) < limit, copies, -1)


def _with_copies(
    params: Any, copies: Array, own: int, limit: int, axis_name: AxisNames, transport: Transport | None
) -> Any:
    """Params of this device's experts and, behind them, of its copies; zeros in free slots."""
    P, S = copies.shape
    me = jax.lax.axis_index(axis_name)
    mine = copies // own == me  # [P, S], what other devices get from this one
    counts = jnp.sum(mine, 1, dtype=jnp.int32)
    # This device's experts in the order of who gets them.
    at = jnp.where(mine.reshape(-1), jnp.cumsum(mine.reshape(-1)) - 1, P * limit)
    which = jnp.zeros(P * limit, jnp.int32).at[at].set((copies % own).reshape(-1), mode="drop")
    way = exchange(counts, P * limit, limit, axis_name, transport)
    wanted = copies[me]
    to = jnp.where(wanted >= 0, wanted // own * limit + _nth_of_pair(copies, own)[me], P * limit)
    back = jnp.full(P * limit, S, jnp.int32).at[to].set(jnp.arange(S, dtype=jnp.int32), mode="drop")

    def whole(leaf):
        copied = moved(way.send(leaf[which]), to, back)
        return jnp.concatenate([leaf, copied])

    return jax.tree.map(whole, params)
