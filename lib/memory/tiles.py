"""Computation in tiles of time, each computed again in the backward pass: ALST's tiled loss and MLP."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ..kernels.common.sharding import vary_like


def tiled(fn: Callable[[Any], Any], x: Any, tiles: int, axis: int = 1) -> Any:
    """fn(x), a tile at a time along an axis: what fn computes in between is there for one tile alone.

    Each tile is computed again in the backward pass, where the gradients of arrays that fn closes over add up
    over the tiles, in float32 or in their own dtype if that is wider. Tile i holds the places i, i + tiles,
    i + 2 tiles, ..., so that devices among which the axis is split share every tile. What is left over at the
    axis's end is a tile of its own. Derivatives are those of reverse mode (`jax.grad`), of first order.

    Args:
      fn: a function of x that treats each place of the axis by itself, such as a head and its cross entropy.
      x: a tree of arrays; all are equally long along the axis.
      tiles: how many; no more are made than the axis is long. 1: fn(x) itself.
      axis: not negative; also where fn's results have it.

    Returns:
      fn's results, arrays or a tree of them.

    Raises:
      ValueError: tiles below 1, arrays of x or results of fn of other lengths, or an axis of unknown length.

    Source: Bekman et al. 2025, Arctic Long Sequence Training (arXiv 2506.13996), "sequence tiling". Their
    loss takes its gradient within the forward pass; here the backward pass computes each tile again.

    Example:
        >>> import frugax, jax, jax.numpy as jnp
        >>> head = jax.random.normal(jax.random.key(0), (4, 9))
        >>> x, labels = jnp.ones((2, 10, 4)), jnp.zeros((2, 10), jnp.int32)
        >>> def losses(xy):
        ...     return jax.nn.logsumexp(xy[0] @ head, -1) - (xy[0] @ head)[..., 0]
        >>> a, b = losses((x, labels)), frugax.memory.tiled(losses, (x, labels), 3)
        >>> bool(jnp.allclose(a, b, atol=1e-6))
        True
    """
    length = _length(x, tiles, axis)
    if min(tiles, length) == 1:
        return fn(x)
    stacked, rest = _cut(x, min(tiles, length), axis)
    pure, consts = jax.closure_convert(fn, jax.tree.map(lambda leaf: leaf[0], stacked))
    found = _over_tiles(pure, stacked, tuple(consts))
    return _joined(found, None if rest is None else jax.checkpoint(fn)(rest), x, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_tiles(fn: Callable[..., Any], stacked: Any, consts: tuple[Any, ...]) -> Any:
    """fn(tile, *consts) of each tile of a stack [tiles, ...]."""
    return jax.lax.map(lambda tile: fn(tile, *consts), stacked)


def _forward(fn, stacked, consts):
    return _over_tiles(fn, stacked, consts), (stacked, consts)


def _backward(fn, kept, cotangents):
    stacked, consts = kept

    def add(sums, this):
        tile, cotangent = this
        _, pull = jax.vjp(fn, tile, *consts)
        of_tile, *of_consts = pull(cotangent)
        sums = jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, tuple(of_consts))
        # Whole numbers, such as labels, have no gradient.
        return sums, jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, of_tile)

    zeros = tuple(vary_like(jnp.zeros(c.shape, _wide(c.dtype)), c) for c in consts)
    sums, of_stacked = jax.lax.scan(add, zeros, (stacked, cotangents))
    return of_stacked, tuple(s.astype(c.dtype) for s, c in zip(sums, consts, strict=True))


_over_tiles.defvjp(_forward, _backward)


def tiled_module(module: nn.Module, x: Array, *, tiles: int) -> Array:
    """module(x), a tile of time at a time, inside a Flax module that holds `module`: as `tiled` does it.

    `init`, calls that change params, and those with a single token or a length that is not known are whole.

    Args:
      module: a module that treats each token by itself, such as `frugax.layers.GLU`.
      x: [B, T, D].
      tiles: how many.

    Returns:
      module(x), [B, T, ...].

    Raises:
      ValueError: tiles below 1.

    Example:
        >>> import flax.linen as nn, frugax, jax, jax.numpy as jnp
        >>> class Tiled(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return frugax.memory.tiled_module(nn.Dense(4), x, tiles=2)
        >>> y, variables = Tiled().init_with_output(jax.random.key(0), jnp.ones((1, 6, 3)))
        >>> bool(jnp.allclose(Tiled().apply(variables, jnp.ones((1, 6, 3))), y))
        True
    """
    if module.is_mutable_collection("params") or not isinstance(x.shape[1], int):
        return module(x)
    length = _length(x, tiles, 1)
    if min(tiles, length) == 1:
        return module(x)
    stacked, rest = _cut(x, min(tiles, length), 1)
    own = jax.tree.map(lambda p: p.dtype, {"params": module.variables.get("params", {})})

    def run(module: nn.Module, stacked: Array) -> Array:
        # The gradients of tiles add up in the dtype that the scan has the params in.
        cast = functools.partial(jax.tree.map, lambda p, dtype: p.astype(dtype))
        one = nn.map_variables(lambda m, x: m(x), "params", trans_in_fn=lambda p: cast(p, own))
        step = nn.remat(lambda m, _, x: (None, one(m, x)), prevent_cse=False)
        split = {"params": False, "low_bit": True, "dropout": True}
        return nn.scan(step, variable_broadcast=True, split_rngs=split)(module, None, stacked)[1]

    widen = functools.partial(jax.tree.map, lambda p: p.astype(_wide(p.dtype)))
    found = nn.map_variables(run, "params", trans_in_fn=widen)(module, stacked)
    return _joined(found, None if rest is None else nn.remat(lambda m, x: m(x))(module, rest), x, 1)


def _wide(dtype: Any) -> Any:
    """The dtype that gradients add up in; that of whole numbers is their own."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else dtype


def _length(x: Any, tiles: int, axis: int) -> int:
    """Return the length of all arrays of x along the axis."""
    if tiles < 1:
        raise ValueError(f"tiles: got {tiles}; expected a number >= 1")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]
    first, *others = [shape[axis] if axis < len(shape) else None for shape in shapes] or [None]
    if not isinstance(first, int) or any(length != first for length in others):
        found = ", ".join(str(list(shape)) for shape in shapes) or "no arrays"
        raise ValueError(f"x: got {found}; expected arrays of one known length along axis {axis}")
    return first


def _cut(x: Any, tiles: int, axis: int) -> tuple[Any, Any]:
    """Every tiles-th place of x as one tile, a stack of them [tiles, ...]; and the rest, or None."""
    length = jax.tree.leaves(x)[0].shape[axis]
    of_tile, rest = divmod(length, tiles)

    def stack(leaf: Array) -> Array:
        even = jax.lax.slice_in_dim(leaf, 0, of_tile * tiles, axis=axis)
        shape = (*leaf.shape[:axis], of_tile, tiles, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(even.reshape(shape), axis + 1, 0)

    over = jax.tree.map(lambda leaf: jax.lax.slice_in_dim(leaf, length - rest, length, axis=axis), x)
    return jax.tree.map(stack, x), over if rest else None


def _joined(stacked: Any, rest: Any, x: Any, axis: int) -> Any:
    """The results of tiles [tiles, ...] and those of the rest in the order of x."""

    def join(leaf: Array, *over: Array) -> Array:
        if leaf.ndim <= axis + 1:
            raise ValueError(
                f"fn: got a result of shape {list(leaf.shape[1:])} for a tile; expected axis {axis} in it"
            )
        whole = jnp.moveaxis(leaf, 0, axis + 1)
        whole = whole.reshape(*whole.shape[:axis], -1, *whole.shape[axis + 2 :])
        return jnp.concatenate([whole, *over], axis=axis)

    joined = jax.tree.map(join, stacked, *() if rest is None else (rest,))
    length = jax.tree.leaves(x)[0].shape[axis]
    for leaf in jax.tree.leaves(joined):
        if leaf.shape[axis] != length:
            raise ValueError(
                f"fn: got results of {leaf.shape[axis]} places; expected one for each of x's {length}"
            )
    return joined
