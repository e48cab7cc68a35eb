"""Mosaic GPU kernel: linear attention over Taylor features, which it makes in registers from narrow q and k.

With z = [x, 1], a feature is a product of two entries of z, and the inner product of the features of x and x'
is (1 + (z . z')^2) / 2. So a chunk's own scores need no features; what the state gives and takes does.
Matrices of zeros and ones pick both factors of 64 features at once, on the tensor cores, exactly.

A program walks one head's chunks, with some channels of v and all features: the state stays in its registers,
and neither features nor states of chunks reach memory. A walk gives outputs, gradients of its queries, or
both. Backward, one walk like the forward pass's gives d_q; one from the end, with k, q and d_out in the roles
of q, k and v, gives d_k, d_v and the gradient of the first state.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.arguments import pad_to, trim
from ..common.hopper import COLS, F32, ROWS, Pipeline, along_columns, along_rows, launch, swizzled
from ..common.tiling import round_up
from .inputs import Inputs, feature_count
from .pallas_gpu_arrays import rows_of, sum_heads
from .pallas_gpu_tiles import CHUNK, SQUARE, ChunkTiles

MOST_FEATURES = 192  # a state's rows: three tiles
MOST_VALUES = 48  # a state's columns in one program: 72 registers a thread with three tiles


def unsupported_reason(call: Inputs, feature_map: str) -> str | None:
    """Why this kernel can't serve the call; None if it can."""
    K = call.q.shape[-1]
    if feature_count(K, feature_map) > MOST_FEATURES:
        return f"feature_map {feature_map!r}: states of at most {MOST_FEATURES} features are served; K is {K}"
    if call.log_decay is not None:
        return f"log_decay beside feature_map {feature_map!r}: features are served without a decay"
    return None


def forward(call: Inputs, scale: float, feature_map: str, *, interpret: bool) -> tuple[Array, Array]:
    """The outputs [B, T, H, V] and the final state [B, H, F, V]."""
    chunks = _Chunks(call, scale, feature_map, interpret)
    results = chunks.walk(chunks.q, chunks.k, chunks.v, None, call.initial_state)
    out = results["out"][:, : call.q.shape[1], :, : call.v.shape[3]]
    return out, chunks.trim_state(results["last"])


def backward(
    call: Inputs, cotangents: tuple[Array, Array], scale: float, feature_map: str, *, interpret: bool
) -> Inputs:
    """The gradient of q, k, v and the initial state."""
    chunks = _Chunks(call, scale, feature_map, interpret)
    q, k, v, d_out = chunks.q, chunks.k, chunks.v, chunks.values(cotangents[0])
    ahead = chunks.walk(q, k, v, d_out, call.initial_state, outputs=False)
    back = chunks.walk(k, q, d_out, v, cotangents[1], reverse=True)

    T, K, V = call.q.shape[1], call.q.shape[3], call.v.shape[3]
    state = call.initial_state
    return Inputs(
        sum_heads(ahead["d_x"][:, :T, :, :K], call.q),
        sum_heads(back["d_x"][:, :T, :, :K], call.k),
        sum_heads(back["out"][:, :T, :, :V], call.v),
        None,
        None,
        None if state is None else chunks.trim_state(back["last"]).astype(state.dtype),
        None,
    )


class _Chunks:
    """A call's arrays as the kernel reads them, and the walks over their chunks."""

    def __init__(self, call: Inputs, scale: float, feature_map: str, interpret: bool):
        (_, T, _, K), V = call.q.shape, call.v.shape[3]
        self.call, self.scale, self.interpret = call, scale, interpret
        self.T = round_up(T, CHUNK)
        self.blocks = -(-V // MOST_VALUES)
        self.wide = round_up(-(-V // self.blocks), 16)
        self.state_sizes = feature_count(K, feature_map), V
        self.features = round_up(self.state_sizes[0], 64)
        self.depth = round_up(K + 1, 16)
        self.q, self.k, self.v = self.narrow(call.q), self.narrow(call.k), self.values(call.v)
        self.rows = rows_of(call)

    def narrow(self, x: Array) -> Array:
        """z = [x, 1]: [B, T', Hx, Z]."""
        z = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        return pad_to(z, (x.shape[0], self.T, x.shape[2], self.depth))

    def values(self, y: Array) -> Array:
        """[B, T', Hy, V'] in the call's dtype."""
        return pad_to(y.astype(self.call.v.dtype), (y.shape[0], self.T, y.shape[2], self.blocks * self.wide))

    def trim_state(self, state: Array) -> Array:
        return trim(state, (*state.shape[:2], *self.state_sizes))

    def walk(
        self,
        x: Array,
        z: Array,
        y: Array,
        other: Array | None,
        initial: Array | None,
        *,
        reverse: bool = False,
        outputs: bool = True,
    ) -> dict[str, Array]:
        """The outputs of x, its gradient for their cotangent `other`, the last state: as `_walk`."""
        rows = self.rows
        reading, writing = rows.query * self.scale, rows.key
        if reverse:
            reading, writing = writing, reading
        if initial is not None:
            initial = pad_to(initial.astype(F32), (*initial.shape[:2], self.features, y.shape[3]))
        return _walk(
            x,
            z,
            y,
            other,
            *self.constants(),
            jnp.stack([reading, rows.run, writing, rows.keep], 3),
            initial,
            self.scale,
            heads=self.call.heads,
            channels=round_up(self.call.q.shape[3], 16),
            wide=self.wide,
            reverse=reverse,
            outputs=outputs,
            packed=self.call.runs is not None,
            interpret=self.interpret,
        )

    def constants(self) -> tuple[Array, Array]:
        """Make matrices that pick both factors of the features of each tile, and their weights."""
        K = self.call.q.shape[3]
        one = jnp.eye(self.depth, dtype=self.call.q.dtype)  # made in the program: it must hold no constants
        one = jnp.concatenate([one[K : K + 1], one[:K]])  # in the order of features, where 1 comes first
        left = jnp.concatenate([jnp.broadcast_to(one[i], (K + 1 - i, self.depth)) for i in range(K + 1)])
        right = jnp.concatenate([one[i:] for i in range(K + 1)])
        weights = jnp.where(jnp.any((left * right)[:, :K] != 0, axis=1), math.sqrt(0.5), 1.0)
        picks = [pad_to(x, (self.features, self.depth)) for x in (left, right)]
        weights = pad_to(weights.astype(F32), (self.features,))
        return jnp.stack(picks).reshape(-1, 64, self.depth), weights.reshape(-1, 64)


def _walk(
    x: Array,
    z: Array,
    y: Array,
    other: Array | None,
    picks: Array,
    weights: Array,
    rows: Array,
    initial: Array | None,
    scale: float,
    *,
    heads: int,
    channels: int,
    wide: int,
    reverse: bool,
    outputs: bool,
    packed: bool,
    interpret: bool,
) -> dict[str, Array]:
    """out = reading * f(x) S + scale * (the chunk's scores of x, z) y; S <- keep S + f(z)^T (writing * y).

    Args:
      x, z: [B, T, Hx, Z], [B, T, Hz, Z]: channels, then a one; T a multiple of CHUNK and Z of 16.
      y: [B, T, Hy, V]; other: the cotangent of out, [B, T, Ho, V], or None. V a multiple of `wide`.
      picks: [2 F / 64, 64, Z], the left factors of F features and then the right ones; weights: [F / 64, 64].
      rows: float32 [B, 1, T / CHUNK, 4, CHUNK]: of each token `reading`, its document, `writing`; `keep`.
      initial: [B, H, F, V] float32, or None for zeros.
      channels: those of x, as a multiple of 16.
      wide: channels of y that one program works on, a multiple of 16.
      reverse: walk from the last chunk to the first, and sum over later tokens.
      outputs: whether out is asked for.
      packed: whether there is more than one document.

    Returns:
      "out" [B, T, H, V] in y's dtype, if asked for; "d_x", the gradient of x, where `other` is given: float32
      [B, T, H * V / wide, channels], from each program's channels of y; and "last", the state after the last
      chunk of the walk, [B, H, F, V] float32.
    """
    B, T, _, Z = x.shape
    V, F, steps = y.shape[-1], weights.size, T // CHUNK
    tile, narrow, state_shape = (CHUNK, wide), (CHUNK, Z), (64, wide)
    blocks = range(F // 64)
    stages = min(2, steps)
    pipeline = Pipeline(steps, stages, ahead=1, backwards=reverse)
    differentiated = other is not None
    groups = [heads // a.shape[2] for a in (x, z, y, *([other] if differentiated else []))]
    tiles = ChunkTiles(interpret)

    def buffer(shape, dtype):
        return swizzled(shape, dtype, math.gcd(128, shape[-1] * jnp.dtype(dtype).itemsize))

    scratch = dict(
        pick_tile=swizzled(picks.shape, picks.dtype, row_bytes=32),  # 16 columns can be told from the rest
        weight_tile=plgpu.SMEM(weights.shape, F32),
        x_tile=swizzled((stages, *narrow), x.dtype, row_bytes=32),
        z_tile=swizzled((stages, *narrow), x.dtype, row_bytes=32),
        y_tile=buffer((stages, *tile), x.dtype),
        row_tile=plgpu.SMEM((stages, 4, CHUNK), F32),
        weighed=buffer(tile, x.dtype),
        state_tile=buffer((len(blocks), *state_shape), x.dtype),
        constants_arrived=plgpu.Barrier(num_arrivals=2),
        arrived=plgpu.Barrier(num_arrivals=4 + differentiated, num_barriers=stages),
    )
    if differentiated:
        scratch["other_tile"] = buffer((stages, *tile), x.dtype)
        scratch["d_tile"] = buffer((CHUNK, channels), F32)
    operands = [a for a in (x, z, y, other, picks, weights, rows, initial) if a is not None]

    def body(*refs):
        refs = list(refs)
        x_ref, z_ref, y_ref = (refs.pop(0) for _ in range(3))
        other_ref = refs.pop(0) if differentiated else None
        pick_ref, weight_ref, row_ref = (refs.pop(0) for _ in range(3))
        initial_ref = refs.pop(0) if initial is not None else None
        out_ref = refs.pop(0) if outputs else None
        d_ref = refs.pop(0) if differentiated else None
        (last_ref,) = refs
        b, h, block = (lax.axis_index(name) for name in ("b", "h", "block"))
        values, own = pl.ds(block * wide, wide), pl.ds(0, channels)
        head = [lax.div(h, group) for group in groups]

        def read_edge(edge, arrived):
            state = []
            for n in blocks:
                plgpu.copy_gmem_to_smem(initial_ref.at[b, h, pl.ds(n * 64, 64), values], edge, arrived)
                plgpu.barrier_wait(arrived)
                state.append(tiles.load(edge))
                plgpu.commit_smem()  # every warp has read before the memory is used again
            return tuple(state)

        def over_chunks(
            state,
            pick_tile,
            weight_tile,
            x_tile,
            z_tile,
            y_tile,
            row_tile,
            weighed,
            state_tile,
            constants_arrived,
            arrived,
            other_tile=None,
            d_tile=None,
        ):
            def fetch(chunk, slot):
                when, barrier = pl.ds(chunk * CHUNK, CHUNK), arrived.at[slot]
                plgpu.copy_gmem_to_smem(x_ref.at[b, when, head[0]], x_tile.at[slot], barrier)
                plgpu.copy_gmem_to_smem(z_ref.at[b, when, head[1]], z_tile.at[slot], barrier)
                plgpu.copy_gmem_to_smem(y_ref.at[b, when, head[2], values], y_tile.at[slot], barrier)
                plgpu.copy_gmem_to_smem(row_ref.at[b, 0, chunk], row_tile.at[slot], barrier)
                if differentiated:
                    plgpu.copy_gmem_to_smem(
                        other_ref.at[b, when, head[3], values], other_tile.at[slot], barrier
                    )

            plgpu.copy_gmem_to_smem(pick_ref, pick_tile, constants_arrived)
            plgpu.copy_gmem_to_smem(weight_ref, weight_tile, constants_arrived)
            pipeline.start(fetch)
            plgpu.barrier_wait(constants_arrived)

            def one(step, state):
                slot, chunk = pipeline.slot(step), pipeline.at(step)
                # The copies out of d_tile and of the other slot of y_tile have read them.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pipeline.refill(step, fetch)
                for n in blocks:
                    state_tile.at[n][...] = state[n].astype(x.dtype)
                plgpu.barrier_wait(arrived.at[slot])
                xs, zs, ys, row = (a.at[slot] for a in (x_tile, z_tile, y_tile, row_tile))
                others = other_tile.at[slot] if differentiated else None
                reading, writing = (tiles.load(row.at[n], ROWS) for n in (0, 2))
                weighed[...] = (tiles.load(ys) * along_rows(writing, tile)).astype(x.dtype)
                plgpu.commit_smem()

                def add_read(n, sums):  # what the state gives
                    out, d_x = sums
                    pick = [pick_tile.at[n], pick_tile.at[len(blocks) + n]]
                    left, right = tiles.add_each(
                        *((tiles.full(SQUARE, 0), (xs, tiles.transposed(factor))) for factor in pick)
                    )
                    weight = along_columns(tiles.load(weight_tile.at[n], COLS), SQUARE)
                    if outputs:
                        features = (left * right * weight).astype(x.dtype)
                        out = tiles.add_products(out, (features, state_tile.at[n]))
                    if differentiated:
                        d_features = tiles.multiply(SQUARE, (others, tiles.transposed(state_tile.at[n])))
                        d_features = d_features * weight * along_rows(reading, SQUARE)
                        d_factors = ((d_features * factor).astype(x.dtype) for factor in (right, left))
                        pairs = zip(d_factors, (factor.at[:, own] for factor in pick), strict=True)
                        d_x = tiles.add_products(d_x, *pairs)
                    return out, d_x

                sums = tiles.full(tile, 0), tiles.full((CHUNK, channels), 0)
                out, d_x = lax.fori_loop(0, len(blocks), add_read, sums)
                i, j = tiles.row_and_column()
                seen = i <= j if reverse else j <= i
                if packed:
                    runs = tiles.load(row.at[1], ROWS), tiles.load(row.at[1], COLS)
                    seen = seen & (along_rows(runs[0], SQUARE) == along_columns(runs[1], SQUARE))
                dots = tiles.multiply(SQUARE, (xs, tiles.transposed(zs)))
                if differentiated:
                    d_dots = tiles.multiply(SQUARE, (others, tiles.transposed(ys))) * dots * scale
                    d_x = tiles.add_products(d_x, (jnp.where(seen, d_dots, 0).astype(x.dtype), zs.at[:, own]))
                    d_tile[...] = d_x
                if outputs:
                    scores = jnp.where(seen, (1 + dots * dots) * (scale / 2), 0).astype(x.dtype)
                    out = tiles.add_products(out * along_rows(reading, tile), (scores, ys))

                keep, following = row_tile[slot, 3, 0], []
                for n in blocks:
                    left, right = tiles.add_each(
                        *(
                            (tiles.full(SQUARE, 0), (pick_tile.at[m], tiles.transposed(zs)))
                            for m in (n, len(blocks) + n)
                        )
                    )
                    weight = along_rows(tiles.load(weight_tile.at[n], ROWS), SQUARE)
                    features = (left * right * weight).astype(x.dtype)
                    following.append(tiles.add_products(state[n] * keep, (features, weighed)))
                if outputs:
                    ys[...] = out.astype(x.dtype)
                plgpu.commit_smem()
                when = pl.ds(chunk * CHUNK, CHUNK)
                if outputs:
                    plgpu.copy_smem_to_gmem(ys, out_ref.at[b, when, h, values])
                if differentiated:
                    plgpu.copy_smem_to_gmem(d_tile, d_ref.at[b, when, h * (V // wide) + block])
                return tuple(following)

            return lax.fori_loop(0, steps, one, state)

        def write_edge(edge):
            for n in blocks:
                edge[...] = state[n]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(edge, last_ref.at[b, h, pl.ds(n * 64, 64), values])
                plgpu.wait_smem_to_gmem(0)

        # One after the other, so that the three share their memory.
        state = tuple(tiles.full(state_shape, 0) for _ in blocks)
        if initial is not None:
            state = pl.run_scoped(read_edge, buffer(state_shape, F32), plgpu.Barrier())
        state = pl.run_scoped(partial(over_chunks, state), **scratch)
        plgpu.wait_smem_to_gmem(0)
        pl.run_scoped(write_edge, buffer(state_shape, F32))

    out_type = {}
    if outputs:
        out_type["out"] = jax.ShapeDtypeStruct((B, T, heads, V), y.dtype)
    if differentiated:
        out_type["d_x"] = jax.ShapeDtypeStruct((B, T, heads * (V // wide), channels), F32)
    out_type["last"] = jax.ShapeDtypeStruct((B, heads, F, V), F32)
    name = "linear_attention_features" + "_d" * differentiated + "_reverse" * reverse
    results = plgpu.kernel(
        body,
        out_type=tuple(out_type.values()),
        grid=(B, heads, V // wide),
        grid_names=("b", "h", "block"),
        **launch(name, interpret=interpret, approx_math=True),
    )(*operands)
    return dict(zip(out_type, results, strict=True))
