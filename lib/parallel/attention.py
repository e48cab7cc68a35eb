"""Softmax attention with time split over devices, inside `jax.shard_map`: by rings, or by heads."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from ..kernels.common.arguments import accumulator
from ..kernels.common.documents import documents
from ..kernels.common.sharding import vary_like

_LOWEST = -1e30  # in place of minus infinity, whose differences are no numbers


class _Marks(NamedTuple):
    """Tokens' documents and positions, int32 [B, T]; None: one document, in the order of time."""

    document: Array | None
    position: Array | None


class _Shard(NamedTuple):
    """Keys and values on their way round the ring, with the marks of their tokens."""

    k: Array  # [B, S, Hk, D]
    v: Array | None
    marks: _Marks


def ring_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t hk d"],
    v: Float[Array, "b t hk d2"],
    *,
    axis_name: str,
    causal: bool = True,
    segment_ids: Int[Array, "b t"] | None = None,
    positions: Int[Array, "b t"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b t h d2"]:
    """Exact softmax attention of this device's queries to the keys of all devices, which travel round a ring.

    A device sees one shard of keys at a time and keeps running maxima and sums, so its memory is that of one
    shard's scores. The backward pass sends keys and values round again, their gradients with them, and
    computes the scores anew.

    Args:
      q: one shard of time of the queries; shards are in the order of time.
      k, v: likewise; Hk divides H, and query head h reads key head h * Hk // H.
      axis_name: a manual mesh axis of the `shard_map` around the call.
      causal: a token sees itself and those before it.
      segment_ids: the document of each token, one shard; a token sees its own document alone. An id that
        comes back is another document.
      positions: the place of each token in its row, one shard: tokens may then lie on any device, such as
        those of `frugax.planner.balanced_order`, and equal ids are one document. None: shards in order.
      scale: of the scores; None: D ** -0.5.

    Returns:
      This shard's outputs, in q's dtype; scores and sums are in float32.

    Raises:
      ValueError: sizes don't fit each other.

    Source: Liu et al. 2023, Ring Attention with Blockwise Transformers (arXiv 2310.01889).

    Example:
        >>> import frugax, functools, jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = frugax.parallel.make_mesh(sequence=-1, data=1)
        >>> f = functools.partial(frugax.parallel.ring_attention, axis_name="sequence")
        >>> split = P(None, "sequence")
        >>> q, k = jnp.ones((1, 16, 4, 8)), jnp.ones((1, 16, 2, 8))
        >>> jax.jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split))(q, k, k).shape
        (1, 16, 4, 8)
    """
    _check(q, k, v, segment_ids, positions)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (vary_like(x, (q, k, v)) for x in (q, k, v))
    return _ring(axis_name, causal, scale)(q, k, v, _marks(segment_ids, positions, axis_name))


def ulysses_attention(
    attention: Callable[..., Array],
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t hk d"],
    v: Float[Array, "b t hk d2"],
    *,
    axis_name: str,
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h d2"]:
    """Run any attention on whole sequences with a share of the heads: one all-to-all before, one after.

    Args:
      attention: `attention(q, k, v)`, or `attention(q, k, v, segment_ids=...)` where ids are given, of whole
        sequences [B, P * T, H / P, D]; it may group query heads by key heads.
      q: one shard of time; P devices divide the heads.
      k, v: likewise. Where key heads are fewer than devices each is sent to all the devices that read it.
      axis_name: a manual mesh axis of the `shard_map` around the call, of P devices.
      segment_ids: one shard; gathered.

    Returns:
      This shard of what `attention` gives.

    Raises:
      ValueError: devices don't divide H, or neither divides the other of P and Hk.

    Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv 2309.14509); Bekman et al. 2025, ALST
    (arXiv 2506.13996), for key heads fewer than devices.

    Example:
        >>> import frugax, functools, jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = frugax.parallel.make_mesh(sequence=-1, data=1)
        >>> whole = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
        >>> f = functools.partial(frugax.parallel.ulysses_attention, whole, axis_name="sequence")
        >>> split = P(None, "sequence")
        >>> q = jnp.ones((1, 16, 4, 8))
        >>> jax.jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split))(q, q, q).shape
        (1, 16, 4, 8)
    """
    _check(q, k, v, segment_ids)
    P, H, Hk = jax.lax.axis_size(axis_name), q.shape[2], k.shape[2]
    if H % P:
        raise ValueError(f"q: got {H} heads; expected a multiple of {P}, the devices of {axis_name!r}")
    if Hk % P:
        if P % Hk:
            raise ValueError(f"k: got {Hk} heads; expected a multiple or a divisor of {P} devices")
        k, v = (jnp.repeat(x, P // Hk, axis=2) for x in (k, v))
    q, k, v = (jax.lax.all_to_all(x, axis_name, 2, 1, tiled=True) for x in (q, k, v))
    given = {}
    if segment_ids is not None:
        given["segment_ids"] = jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    return jax.lax.all_to_all(attention(q, k, v, **given), axis_name, 1, 2, tiled=True)


def ring_self_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t hk d"],
    v: Float[Array, "b t hk d2"],
    *,
    axis_name: str,
    causal: bool = True,
    segment_ids: Int[Array, "b t"] | None = None,
    positions: Int[Array, "b t"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b t h d2"]:
    """Softmax attention in two rings, as sequence parallelism began: keys go round, then values.

    All scores of a device's queries [T, P * T] are kept between the rings, which `ring_attention` avoids.
    Here for the record; arguments and result are the same.

    Source: Li et al. 2021, Sequence Parallelism: Long Sequence Training from System Perspective
    (arXiv 2105.13120).

    Example:
        >>> import frugax, functools, jax, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> mesh = frugax.parallel.make_mesh(sequence=-1, data=1)
        >>> f = functools.partial(frugax.parallel.ring_self_attention, axis_name="sequence")
        >>> split = P(None, "sequence")
        >>> q = jnp.ones((1, 16, 4, 8))
        >>> jax.jit(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split))(q, q, q).shape
        (1, 16, 4, 8)
    """
    _check(q, k, v, segment_ids, positions)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    P = jax.lax.axis_size(axis_name)
    marks = _marks(segment_ids, positions, axis_name)
    shard = _Shard(k, None, marks)
    scores = []
    for step in range(P):
        scores.append(_scores(q, shard, step, marks, causal, scale, axis_name))
        shard = _next(shard, axis_name) if step + 1 < P else shard
    # Scores lie by the step at which their keys came; values come in the same order.
    weights = jax.nn.softmax(jnp.stack(scores, 3), axis=(3, 4))  # [B, H, T, P, S]
    out = _weighted(weights[:, :, :, 0], v)
    for step in range(1, P):
        v = _next(v, axis_name)
        out = out + _weighted(weights[:, :, :, step], v)
    return out.astype(q.dtype)


def _ring(axis_name: str, causal: bool, scale: float):
    """The ring as a function with its own gradient, of arrays alone."""

    @jax.custom_vjp
    def run(q, k, v, marks):
        return forward(q, k, v, marks)[0]

    def forward(q, k, v, marks):
        P = jax.lax.axis_size(axis_name)
        B, T, H, _ = q.shape
        wide = accumulator(q.dtype)
        start = (
            jnp.full((B, H, T), _LOWEST, wide),
            jnp.zeros((B, H, T), wide),
            jnp.zeros((B, T, H, v.shape[-1]), wide),
        )
        carry = (_Shard(k, v, marks), *(vary_like(x, (q, k, v)) for x in start))

        def step(carry, number):
            shard, top, total, out = carry
            s = _scores(q, shard, number, marks, causal, scale, axis_name)
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.where(s > _LOWEST / 2, jnp.exp(s - new_top[..., None]), 0)
            old = jnp.exp(top - new_top)
            total = total * old + p.sum(-1)
            out = out * jnp.moveaxis(old, 1, 2)[..., None] + _weighted(p, shard.v)
            return (_next(shard, axis_name), new_top, total, out), None

        (_, top, total, out), _ = jax.lax.scan(step, carry, jnp.arange(P))
        out = (out / jnp.moveaxis(total, 1, 2)[..., None]).astype(q.dtype)
        return out, (q, k, v, marks, out, top + jnp.log(total))

    def backward(kept, dout):
        q, k, v, marks, out, lse = kept
        P, wide = jax.lax.axis_size(axis_name), accumulator(q.dtype)
        dout, out = dout.astype(wide), out.astype(wide)
        delta = jnp.einsum("bthd,bthd->bht", dout, out)
        zeros = [vary_like(jnp.zeros(x.shape, wide), (q, k, v)) for x in (q, k, v)]
        H, Hk = q.shape[2], k.shape[2]

        def step(carry, number):
            shard, dk, dv, dq = carry
            s = _scores(q, shard, number, marks, causal, scale, axis_name)
            p = jnp.where(s > _LOWEST / 2, jnp.exp(s - lse[..., None]), 0)
            v_wide = jnp.repeat(shard.v, H // Hk, 2).astype(wide)
            k_wide = jnp.repeat(shard.k, H // Hk, 2).astype(wide)
            ds = p * (jnp.einsum("bthd,bshd->bhts", dout, v_wide) - delta[..., None]) * scale
            dq = dq + jnp.einsum("bhts,bshd->bthd", ds, k_wide)
            dk = dk + _by_key_head(jnp.einsum("bhts,bthd->bshd", ds, q.astype(wide)), Hk)
            dv = dv + _by_key_head(jnp.einsum("bhts,bthd->bshd", p, dout), Hk)
            shard, dk, dv = _next((shard, dk, dv), axis_name)
            return (shard, dk, dv, dq), None

        carry = (_Shard(k, v, marks), zeros[1], zeros[2], zeros[0])
        (_, dk, dv, dq), _ = jax.lax.scan(step, carry, jnp.arange(P))  # P steps bring gradients home
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    run.defvjp(forward, backward)
    return run


def _scores(q, shard: _Shard, step, marks: _Marks, causal: bool, scale: float, axis_name: str) -> Array:
    """[B, H, T, S], the lowest number where a query does not see a key; keys were sent `step` times."""
    H, Hk = q.shape[2], shard.k.shape[2]
    k = jnp.repeat(shard.k, H // Hk, axis=2)
    s = scale * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=accumulator(q.dtype))
    sees = jnp.ones((1, q.shape[1], k.shape[1]), bool)
    if causal and marks.position is not None and shard.marks.position is not None:
        sees = marks.position[:, :, None] >= shard.marks.position[:, None]
    elif causal:
        P, here = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
        ahead = (here - (here - step) % P) * k.shape[1]  # how far the queries' shard is ahead of the keys'
        t = jnp.arange(q.shape[1], dtype=jnp.int32)
        sees = sees & (ahead + t[:, None] >= t[None])[None]
    if marks.document is not None and shard.marks.document is not None:
        sees = sees & (marks.document[:, :, None] == shard.marks.document[:, None])
    return jnp.where(sees[:, None], s, _LOWEST)


def _weighted(p: Array, v: Array) -> Array:
    v = jnp.repeat(v, p.shape[1] // v.shape[2], axis=2)
    return jnp.einsum("bhts,bshd->bthd", p, v.astype(p.dtype))


def _by_key_head(x: Array, heads: int) -> Array:
    """Add up the gradients of the query heads that read the same key head."""
    return x.reshape(*x.shape[:2], heads, -1, x.shape[-1]).sum(3)


def _next(tree, axis_name: str):
    """Send a tree to the next device of the ring."""
    P = jax.lax.axis_size(axis_name)
    ring = [(i, (i + 1) % P) for i in range(P)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis_name, ring), tree)


def _marks(segment_ids: Array | None, positions: Array | None, axis_name: str) -> _Marks:
    """The marks of one shard; with positions neighbours may be anywhere, so ids are taken as they are."""
    if positions is not None or segment_ids is None:
        return _Marks(segment_ids, positions)
    return _Marks(_document_numbers(segment_ids, axis_name), None)


def _document_numbers(segment_ids: Array, axis_name: str) -> Array:
    """Number the documents of whole rows: int32 [B, T], one shard."""
    inside = documents(segment_ids, *segment_ids.shape).index
    ends = jnp.stack([segment_ids[:, 0], segment_ids[:, -1], inside[:, -1]]).astype(jnp.int32)
    first, last, count = jnp.moveaxis(jax.lax.all_gather(ends, axis_name), 1, 0)  # each [shards, B]
    new = jnp.concatenate([jnp.zeros_like(first[:1]), (first[1:] != last[:-1]).astype(jnp.int32)])
    before = jnp.cumsum(count, 0) - count + jnp.cumsum(new, 0)
    return inside + before[jax.lax.axis_index(axis_name)][:, None]


def _check(q: Array, k: Array, v: Array, segment_ids: Array | None, positions: Array | None = None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name}: got {x.dtype}{list(x.shape)}; expected floats [batch, time, heads, size]"
            )
    B, T, H, D = q.shape
    if k.shape[:2] != (B, T) or k.shape[3] != D or H % k.shape[2]:
        raise ValueError(f"k: got {list(k.shape)}; expected [{B}, {T}, a divisor of {H}, {D}]")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: got {list(v.shape)}; expected {[*k.shape[:3]]} and any size")
    for name, marks in (("segment_ids", segment_ids), ("positions", positions)):
        if marks is not None and marks.shape != (B, T):
            raise ValueError(f"{name}: got {list(marks.shape)}; expected [{B}, {T}]")
