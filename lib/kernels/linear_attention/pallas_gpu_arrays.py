"""Arrays around the Mosaic GPU kernels of linear attention: weights of tokens, padding, sums over heads."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..common.arguments import pad_to
from ..common.tiling import round_up
from .inputs import Inputs
from .pallas_gpu_tiles import CHUNK, SMALLEST_LOG


class Rows(NamedTuple):
    """Float32 numbers of each token, [B, 1 or H, T / CHUNK, CHUNK]; a decay per channel is not in them."""

    query: Array  # the decay from the chunk's start to what the token reads; 0 in a later run
    key: Array  # the decay from the token to the chunk's end; 0 in an earlier run
    keep: Array  # the decay of the whole chunk, at each of its tokens; 0 where it holds a boundary
    sum_as_query: Array  # log of `query` before runs are looked at
    sum_as_key: Array  # the same, the token's own decay always included
    run: Array


def rows_of(call: Inputs) -> Rows:
    """The weights of a call's tokens, T of them and then some to whole chunks, which change no state."""
    (B, T), H = call.q.shape[:2], call.heads
    length = round_up(T, CHUNK)
    runs = jnp.zeros((B, T), jnp.int32) if call.runs is None else call.runs
    shape = (B, 1, length // CHUNK, CHUNK)
    run = jnp.pad(runs, ((0, 0), (0, length - T)), mode="edge").reshape(shape)
    end = run[..., -1:]
    start = jnp.pad(end[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))  # the incoming state belongs to run 0
    g = call.log_decay
    if g is None or g.ndim == 4:
        g = jnp.zeros((1, 1, 1, 1), jnp.float32)
    else:
        g = jnp.broadcast_to(g, (B, T, H)) if g.ndim == 1 else g
        g = pad_axes(jnp.maximum(g.astype(jnp.float32), SMALLEST_LOG), length, axes=(1,))
        g = g.swapaxes(1, 2).reshape(B, H, *shape[2:])
    g = jnp.broadcast_to(g, (B, g.shape[1], *shape[2:]))
    through = jnp.cumsum(g, -1)
    until = jnp.pad(through[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    behind = jnp.cumsum(g[..., ::-1], -1)[..., ::-1]
    behind = jnp.pad(behind[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
    as_query = through if call.bonus is None else until
    keep = jnp.exp(through[..., -1:]) * (start == end)
    return Rows(
        jnp.exp(as_query) * (run == start),
        jnp.exp(behind) * (run == end),
        jnp.broadcast_to(keep, g.shape),
        as_query,
        through,
        jnp.broadcast_to(run.astype(jnp.float32), g.shape),
    )


def pad_axes(x: Array, *sizes: int, axes: tuple[int, ...] = (1, 3)) -> Array:
    """x with zeros behind its end along `axes`, up to `sizes`."""
    to = dict(zip(axes, sizes, strict=True))
    return pad_to(x, [to.get(axis, size) for axis, size in enumerate(x.shape)])


def sum_heads(d_x: Array, x: Array) -> Array:
    """Add up the gradients of the heads that read one head of x."""
    if d_x.shape[2] != x.shape[2]:
        d_x = d_x.astype(jnp.float32).reshape(*d_x.shape[:2], x.shape[2], -1, d_x.shape[3]).sum(3)
    return d_x.astype(x.dtype)
