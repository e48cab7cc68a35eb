"""Expert parallelism: tokens travel to the devices of their experts and back, inside `jax.shard_map`."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int, Key

from ..kernels.common.sharding import vary_like
from ..moe.dispatch import combine, dispatch, places
from ..moe.routing import Routing, tokens_an_expert
from .activations import automatic_axes, in_stage
from .exchange import AxisNames, Transport, exchange, moved
from .mesh import BATCH_AXES

# (params of this device's experts, rows [M, D] in their order, group_sizes [E / P]) -> [M, D']
Experts = Callable[[Any, Array, Array], Array]


class ExpertLoad(NamedTuple):
    """Tokens that experts got, over all devices.

    Attributes:
      tokens: of each expert, int32 [E].
      dropped: the share of assignments that found no place.
      busiest: tokens of the device that has most of them, int32.

    Example:
        >>> import frugax, jax.numpy as jnp
        >>> load = frugax.parallel.ExpertLoad(jnp.array([3, 1]), jnp.zeros(()), jnp.array(4))
        >>> int(load.tokens.sum())
        4
    """

    tokens: Int[Array, "e"]
    dropped: Float[Array, ""]
    busiest: Int[Array, ""]


def expert_parallel(
    x: Float[Array, "t d"],
    routing: Routing,
    experts: Experts,
    params: Any,
    *,
    axis_name: AxisNames,
    tensor_axis: AxisNames = (),
    token_axes: AxisNames | None = None,
    capacity: int | float | None = None,
    capacity_axes: AxisNames = (),
    max_rows: int | None = None,
    key: Key[Array, ""] | None = None,
    transport: Transport | None = None,
) -> tuple[Float[Array, "t d2"], ExpertLoad]:
    """Apply experts that are split over devices to this device's tokens; for use inside `jax.shard_map`.

    Tokens are sorted by expert, travel to their experts' devices by one all-to-all, are sorted again, and
    return the same way. The expert axis may be any axes of the mesh that tokens are split over: "data",
    ("data", "tensor"), ("sequence", "tensor"); the rest of the model may use the same axes as it likes
    (folding). Over axes that are in neither `axis_name` nor `tensor_axis`, experts are copies, and
    `shard_map` adds up their gradients.

    Args:
      x: tokens of this device.
      routing: theirs, to all E experts. For losses over all tokens give the router the whole batch outside of
        `shard_map`, or its losses an `axis_name`.
      experts: `experts(params, rows [M, D], group_sizes [E / P])` gives [M, D2]: the first `group_sizes[0]`
        rows are of this device's first expert, and rows past their sum are not read.
      params: of this device's experts, each with E / P in front.
      axis_name: mesh axis or axes of the P devices, each with E / P neighbouring experts.
      tensor_axis: axis or axes over which experts' hidden width is split: `experts` then gives a part of a
        sum. Tokens are gathered over it before and scattered after, so it too splits the tokens.
      token_axes: all axes that split tokens, for `ExpertLoad`; None: those of the experts.
      capacity: tokens of an expert, the others are dropped, second choices before first ones; a float is a
        factor of the mean number of assignments, rounded up. None drops nothing.
      capacity_axes: axes over which tokens share an expert's capacity. With () each device has its own and
        drops without a word to the others (sub-sequence dropping); with the axes that split a sequence, or
        all tokens, the same tokens are dropped as on one device.
      max_rows: the most rows that a device sends to another, which bounds memory; what is over is dropped.
        None: as many as there can be.
      key: drop any tokens instead of the last, of any devices; the same on all of them.
      transport: as in `Exchange`.

    Returns:
      [T, D2] in the dtype of what experts give, and the load over `token_axes`.

    Raises:
      ValueError: an argument can't be right; the message names it.

    Source: Lepikhin et al. 2020, GShard (arXiv 2006.16668); Liu et al. 2025, MoE Parallel Folding
    (arXiv 2504.14960).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("expert",), axis_types=(AxisType.Auto,))
        >>> x, w = jnp.ones((6, 4)), jnp.ones((2, 4, 3))
        >>> experts = lambda w, rows, sizes: jax.lax.ragged_dot(rows, w, sizes)
        >>> def layer(x, w):
        ...     routing = frugax.moe.softmax_top_k(x[:, :2], 2)
        ...     return frugax.parallel.expert_parallel(x, routing, experts, w, axis_name="expert")
        >>> split = P("expert")
        >>> layer = jax.shard_map(layer, mesh=mesh, in_specs=(split, split), out_specs=(split, P()))
        >>> y, load = jax.jit(layer)(x, w)
        >>> y.shape, load.tokens.tolist(), float(load.dropped)
        ((6, 3), [6, 6], 0.0)
    """
    axes, tensor = as_tuple(axis_name), as_tuple(tensor_axis)
    token_axes = (*axes, *tensor) if token_axes is None else as_tuple(token_axes)
    devices = jax.lax.axis_size(axes)
    check_experts(routing, params, devices, axes)
    x = vary_like(x, (x, routing.weights))
    asked = jnp.sum(routing.weights != 0)
    bound = [len(x) * min(routing.indices.size // len(x), routing.experts // devices)]
    if routing.by == "expert":
        bound = [routing.indices.size // devices]
    if capacity is not None:
        count = _capacity(capacity, routing, as_tuple(capacity_axes))
        routing = _limited(routing, count, as_tuple(capacity_axes), key)
        bound.append(routing.experts // devices * count)
    if max_rows is not None:
        if max_rows < 1:
            raise ValueError(f"max_rows: got {max_rows}; expected at least 1")
        bound.append(max_rows)

    rows, plan = dispatch(x, routing)
    counts_PE = plan.group_sizes.reshape(devices, -1)
    way = exchange(jnp.sum(counts_PE, 1, dtype=jnp.int32), len(rows), min(bound), axes, transport)
    counts_PE = _first(counts_PE, way.counts)
    slots, counts_SE = way.send(rows), jax.lax.all_to_all(counts_PE, axes, 0, 0, tiled=True)
    if tensor:
        slots = jax.lax.all_gather(slots, tensor, tiled=True)
        counts_SE = jax.lax.all_gather(counts_SE, tensor, tiled=True)
    to, back = _by_expert(counts_SE, way.places)
    sizes = jnp.sum(counts_SE, 0, dtype=jnp.int32)
    y = moved(experts(params, moved(slots, to, back), sizes), back, to)
    if tensor:
        y = jax.lax.psum_scatter(y, tensor, tiled=True)
    y = combine(way.bring_back(y), plan)

    tokens = jax.lax.psum(counts_PE.reshape(-1), token_axes)
    share = jax.lax.psum(jnp.sum(counts_PE), token_axes) / jnp.maximum(jax.lax.psum(asked, token_axes), 1)
    busiest = jax.lax.pmax(jnp.sum(sizes), token_axes)
    return y, jax.lax.stop_gradient(ExpertLoad(tokens, 1 - share, busiest))


def experts_over_mesh(
    x: Float[Array, "t d"],
    routing: Routing,
    experts: Experts,
    params: Any,
    *,
    axis_name: AxisNames,
    token_axes: AxisNames | None = None,
    capacity: int | float | None = None,
    capacity_axes: AxisNames | None = None,
    key: Key[Array, ""] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    **options: Any,
) -> tuple[Float[Array, "t d2"], ExpertLoad]:
    """Apply experts that are split over a mesh to all tokens, outside of `jax.shard_map`.

    Under `jit` the compiler splits the router by itself, so its losses and statistics are of all tokens.

    Args:
      x: all tokens.
      routing: theirs, to E experts.
      experts: as in `expert_parallel`.
      params: of all experts, each with E in front.
      axis_name: mesh axis or axes that experts are split over.
      token_axes: axes that tokens are split over, at least those. None: of the mesh's axes those that split
        a batch (`BATCH_AXES`), and those of the experts.
      capacity, key: as in `expert_parallel`.
      capacity_axes: as there, but None, all `token_axes`: the same tokens are dropped as on one device.
      mesh: None: that of `jax.set_mesh`.
      options: others of `expert_parallel`.

    Raises:
      ValueError: there is no mesh or no such axis, or sizes do not divide.

    Source: Liu et al. 2025, MoE Parallel Folding (arXiv 2504.14960).

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> x, w = jnp.ones((6, 4)), jnp.ones((2, 4, 3))
        >>> experts = lambda w, rows, sizes: jax.lax.ragged_dot(rows, w, sizes)
        >>> def layer(x, w):
        ...     routing = frugax.moe.softmax_top_k(x[:, :2], 2)
        ...     return frugax.parallel.experts_over_mesh(x, routing, experts, w, axis_name="data", mesh=mesh)
        >>> y, load = jax.jit(layer)(x, w)
        >>> y.shape, load.tokens.tolist()
        ((6, 3), [6, 6])
    """
    axes = as_tuple(axis_name)
    within = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if token_axes is None:
        token_axes = tuple(axis for axis in within.axis_names if axis in (*BATCH_AXES, *axes))
    token_axes = as_tuple(token_axes)
    for name, given in (("axis_name", axes), ("token_axes", token_axes)):
        if not set(given) <= set(within.axis_names):
            raise ValueError(
                f"{name}: got {given}; expected axes of the mesh in context, {within.axis_names}"
            )
    capacity_axes = token_axes if capacity_axes is None else capacity_axes
    if not set(axes) <= set(token_axes):
        raise ValueError(f"axis_name: got {axes}; expected axes that tokens are split over, {token_axes}")
    _check_single(routing)
    if routing.by != "token":
        raise ValueError("routing: got one where experts choose; expected one where tokens choose")
    size = math.prod(within.shape[axis] for axis in token_axes)
    if len(x) % size:
        got = f"x: got {len(x)} tokens"
        raise ValueError(f"{got}; expected a multiple of {size}, the devices of {token_axes}")
    check_experts(routing, params, math.prod(within.shape[axis] for axis in axes), axes, whole=True)

    def local(x, routing, params, key):
        drop = dict(capacity=capacity, capacity_axes=capacity_axes, key=key)
        same = dict(axis_name=axes, token_axes=token_axes)
        return expert_parallel(x, routing, experts, params, **same, **drop, **options)

    split = P(token_axes)
    by_token = _by_token(routing, split)
    kinds = zip(within.axis_names, within.axis_types, strict=True)
    free = {axis for axis, kind in kinds if kind is not AxisType.Manual}  # others are of a `shard_map` around
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(split, by_token, P(axes), P()), out_specs=(split, P()), axis_names=free
    )
    return run(x, routing, params, key)


def own_tokens(
    mix: Callable[[Array, Routing, Any], Array], x: Float[Array, "t d"], routing: Routing, params: Any
) -> Float[Array, "t d2"]:
    """Return mix(x, routing, params), by each device for its own tokens in a stage of a pipeline.

    There a `shard_map` has one axis of the mesh, and the compiler the others. Loops over the rows of experts
    take other numbers of steps in each stage: a collective that the compiler puts into such a loop would wait
    for a stage that has left it. So every device has all experts' params at hand, and loops send nothing.
    Outside of such a stage the compiler splits `mix`.
    """
    if not in_stage():
        return mix(x, routing, params)
    free = automatic_axes()
    axes = tuple(free) if routing.by == "token" else ()  # experts choose from all tokens
    while len(x) % math.prod(free[axis] for axis in axes):
        axes = axes[:-1]
    run = jax.shard_map(
        mix, in_specs=(P(axes), _by_token(routing, P(axes)), P()), out_specs=P(axes), axis_names=set(free)
    )
    return run(x, routing, params)


def _by_token(routing: Routing, split: P) -> Any:
    """The places of a routing's arrays: those of each token as tokens are split, others everywhere."""
    return jax.tree.map(lambda a: split if a is routing.indices or a is routing.weights else P(), routing)


def _limited(routing: Routing, capacity: int, axes: tuple[str, ...], key: Array | None) -> Routing:
    """Set the weight of each assignment over an expert's capacity to 0, which is to drop it.

    Over `axes` a token's place is that in the order of choices, then of devices, then of tokens, as on one
    device; with a key devices and tokens are in any order. Only counts [k, E] travel for it.
    """
    device = jax.lax.axis_index(axes) if axes else 0
    place = places(routing, key if key is None else jax.random.fold_in(key, device))
    if axes:
        _, experts, weights = routing.assignments()
        choices = routing.indices.shape[1] if routing.by == "token" else 1
        choice = jnp.arange(len(experts)) % choices
        counts = jnp.zeros((choices, routing.experts), jnp.int32)
        counts = counts.at[choice, experts].add((weights != 0).astype(jnp.int32))
        every = jax.lax.all_gather(counts, axes)  # [devices, k, E]
        order = jnp.arange(len(every)) if key is None else jax.random.permutation(key, len(every))
        before = order < order[device]
        earlier = jnp.sum(every * before[:, None, None], 0)  # the same choice, on devices before this one
        others = jnp.sum(every, 0) - counts
        place = place + (earlier + jnp.cumsum(others, 0) - others)[choice, experts]
    kept = place.reshape(routing.weights.shape) < capacity
    return dataclasses.replace(routing, weights=jnp.where(kept, routing.weights, 0.0))


def expert_parallel_bytes(
    tokens: int,
    width: int,
    experts: int,
    k: int,
    *,
    devices: int,
    tensor: int = 1,
    capacity: int | None = None,
    itemsize: int = 2,
) -> dict[str, int]:
    """Count the bytes that a device receives in a forward pass of `expert_parallel` with padded rows.

    A backward pass has as many. A device sends R = min(tokens * min(k, E / P), E / P * capacity) rows to each
    other one. The two all-to-alls bring (P - 1) R rows each. Where the experts' width is split, the gather
    and the scatter bring (tensor - 1) P R each; folding the expert axis over the tensor axis saves them.

    Args:
      tokens: of a device.
      width: D.
      experts: E.
      k: experts of a token.
      devices: P, those that experts are split over.
      tensor: devices that an expert's width is split over.
      capacity: of an expert, for the tokens of one device.
      itemsize: bytes of a number.

    Source: Liu et al. 2025, MoE Parallel Folding (arXiv 2504.14960).

    Example:
        >>> import frugax
        >>> frugax.parallel.expert_parallel_bytes(8, 4, 16, 1, devices=4, capacity=1, itemsize=1)
        {'all_to_all': 96, 'all_gather': 0, 'reduce_scatter': 0}
    """
    R = tokens * min(k, experts // devices)
    R = R if capacity is None else min(R, experts // devices * capacity)
    row = width * itemsize
    over_tensor = (tensor - 1) * devices * R * row
    return {
        "all_to_all": 2 * (devices - 1) * R * row,
        "all_gather": over_tensor,
        "reduce_scatter": over_tensor,
    }


def check_experts(
    routing: Routing, params: Any, devices: int, axes: tuple[str, ...], *, whole: bool = False
) -> None:
    """Raise ValueError unless the experts divide over the devices, and params have them in front."""
    _check_single(routing)
    E = routing.experts
    if E % devices:
        raise ValueError(f"routing: got {E} experts; expected a multiple of {devices}, the devices of {axes}")
    expected = E if whole else E // devices
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.shape[:1] != (expected,):
            where = f"params{jax.tree_util.keystr(path)}: got {list(leaf.shape)}"
            raise ValueError(f"{where}; expected {expected} experts in front, of {E} over {devices} devices")


def _check_single(routing: Any) -> None:
    if not isinstance(routing, Routing):
        raise ValueError(f"routing: got {type(routing).__name__}; expected a Routing to single experts")


def as_tuple(axes: AxisNames) -> tuple[str, ...]:
    """Name axes as a tuple, also a single one."""
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _capacity(capacity: int | float, routing: Routing, axes: tuple[str, ...]) -> int:
    shared = jax.lax.axis_size(axes) if axes else 1
    return tokens_an_expert(capacity, routing.indices.size * shared / routing.experts)


def _first(counts_PE: Array, most_P: Array) -> Array:
    """Counts of what is left of each device's rows when those over its limit stay at home, the last first."""
    ends = jnp.minimum(jnp.cumsum(counts_PE, 1), most_P[:, None])
    return jnp.diff(ends, axis=1, prepend=0).astype(jnp.int32)


def _by_expert(counts_SE: Array, places: int) -> tuple[Array, Array]:
    """The order by expert of rows that came by sender, each sender's by expert: indices there and back.

    Returns:
      the slot that each of the S * places rows by expert came in (S * places: none), and each slot's row.
    """
    S, E = counts_SE.shape
    j = jnp.arange(places, dtype=jnp.int32)
    ends = jnp.cumsum(counts_SE, 1)
    expert = jax.vmap(lambda end: jnp.searchsorted(end, j, side="right"))(ends)  # [S, places], E: free
    first = jnp.cumsum(jnp.sum(counts_SE, 0)) - jnp.sum(counts_SE, 0)  # [E], an expert's first row
    before = jnp.cumsum(counts_SE, 0) - counts_SE  # of earlier senders
    shift = first[None] + before - (ends - counts_SE)
    row = jnp.take_along_axis(shift, jnp.minimum(expert, E - 1), 1) + j[None]
    back = jnp.where(expert < E, row, S * places).reshape(-1).astype(jnp.int32)
    to = jnp.full(S * places, S * places, jnp.int32)
    to = to.at[back].set(jnp.arange(S * places, dtype=jnp.int32), mode="drop", unique_indices=False)
    return to, back
