"""The cells on TPU: a head's R stays in VMEM over all steps, as states do; gates pass by in blocks of time.

Time is in front and the batch on sublanes: a step is one index, and its product has the batch for rows. What
the products around a layer write and read, gates, h and their gradients, comes and goes as [time, batch,
heads * n * channels]: XLA lets those products put time first, where heads before the batch would take a copy.
The kernels' own arrays are [time, heads, n, batch, channels]. The walk back finds a block's pre-activations
in one product; R's gradient is one over all tokens after it, which alone moves h to where it wants it.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ..common.arguments import pad_to, trim
from ..common.chips import LANES, VMEM_LIMIT
from ..common.tiling import round_up
from ..common.tpu import F32, Launch, TimeGrid, dot
from .cells import Cell
from .inputs import Inputs
from .tiling import Shape, TPUTiling, for_tpu
from .tokens import before, matrix_gradients


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.gates.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel reads float32 and bfloat16, not {call.gates.dtype}"
    reasons = (_tiling(call, backward)[1] for backward in (False, True))
    return next((reason for reason in reasons if reason is not None), None)


def forward(call: Inputs, keep: bool = False, *, interpret: bool) -> tuple[Array, ...]:
    """h [B, T, H, D], the last state [B, S, H, D]; with `keep` also what steps read [T, H, R, B, D]."""
    B, T, H, G, D = call.gates.shape
    cell, dtype = call.cell, call.gates.dtype
    blocks = _Blocks(call, backward=False)
    S, R = len(cell.states), len(cell.reads) if keep else 0
    launch = blocks.grid.launch("rnn_forward", interpret=interpret, vmem_limit=VMEM_LIMIT)
    matrix, bias = blocks.parameters()
    launch.add("x", blocks.wide_time_first(call.gates, dtype), blocks.wide_block(G))
    launch.add("matrix", matrix, blocks.matrix(G))
    launch.add("bias", bias, blocks.bias(G))
    launch.add("first", blocks.time_first_state(call.initial_state), blocks.state(S))
    launch.add("starts", blocks.time_first_starts(), blocks.starts)
    launch.write("h", *blocks.wide_tokens(1, dtype), blocks.wide_block(1))
    launch.write("last", *blocks.states(S), blocks.state(S))
    if R:
        launch.write("reads", *blocks.tokens(R, F32), blocks.block(R))
    blocks.hold(launch, "state", S)
    launch.hold("operand", (blocks.tiling.batch, blocks.D), dtype)
    got = launch.run(partial(_forward_kernel, cell=cell, blocks=blocks))
    results = blocks.wide_batch_first(got["h"])[:, :, :, 0], blocks.batch_first_state(got["last"])
    if not keep:
        return results
    return (*results, got["reads"][:T, :, :, :B, :D] if R else jnp.zeros((T, H, 0, B, D), F32))


def backward(
    call: Inputs, h: Array, reads: Array, cotangents: tuple[Array, Array], *, interpret: bool
) -> Inputs:
    """The gradients, as `Inputs`, from what `forward` returned."""
    cell, dtype = call.cell, call.gates.dtype
    blocks = _Blocks(call, backward=True)
    P, S, R, G = cell.pre_activations, len(cell.states), len(cell.reads), cell.gates
    dh, dlast = cotangents
    launch = blocks.grid.launch("rnn_backward", interpret=interpret, vmem_limit=VMEM_LIMIT)
    matrix, bias = blocks.parameters()
    launch.add("x", blocks.wide_time_first(call.gates, dtype), blocks.wide_block(G))
    launch.add("before", blocks.wide_time_first(before(call, h)[:, :, :, None], dtype), blocks.wide_block(1))
    launch.add("bias", bias, blocks.bias(G))
    if R:
        launch.add("reads", pad_to(reads, blocks.tokens(R, F32)[0]), blocks.block(R))
    launch.add("dh", blocks.wide_time_first(dh[:, :, :, None], dtype), blocks.wide_block(1))
    launch.add("matrix", matrix, blocks.matrix(G))
    launch.add("dlast", blocks.time_first_state(dlast), blocks.state(S))
    launch.add("starts", blocks.time_first_starts(), blocks.starts)
    launch.write("dgates", *blocks.wide_tokens(G, dtype), blocks.wide_block(G))
    launch.write("dpre", *blocks.tokens(P, dtype), blocks.block(P))
    launch.write("dfirst", *blocks.states(S), blocks.state(S))
    blocks.hold(launch, "dstate", S)
    launch.hold("pre", (blocks.tiling.time, P, blocks.tiling.batch, blocks.D))
    got = launch.run(partial(_backward_kernel, cell=cell, blocks=blocks))
    return matrix_gradients(call, h, blocks.batch_first(got["dpre"]))._replace(
        gates=blocks.wide_batch_first(got["dgates"]), initial_state=blocks.batch_first_state(got["dfirst"])
    )


def _tiling(call: Inputs, backward: bool) -> tuple[TPUTiling | None, str | None]:
    B, T, H, _, D = call.gates.shape
    shape = Shape(B, T, H, D, call.gates.dtype.itemsize, call.starts is not None)
    return for_tpu(call.cell, shape, backward=backward)


class _Blocks:
    """The grid (head, batch, time), time maybe backwards, and the views of arrays that go with it."""

    def __init__(self, call: Inputs, *, backward: bool):
        tiling, _ = _tiling(call, backward)
        assert tiling is not None  # unsupported_reason
        self.call, self.tiling = call, tiling
        self.B, self.T, self.H, _, size = call.gates.shape
        self.D = round_up(size, LANES)
        self.batches = pl.cdiv(self.B, tiling.batch)
        self.grid = TimeGrid((self.H, self.batches), self.T, tiling.time, backward)
        self.columns = range(0, self.D, tiling.columns)

    def block(self, n: int) -> pl.BlockSpec:
        """The block of [T, H, n, B, D]: n rows of channels for each token and sequence."""
        shape = (self.tiling.time, None, n, self.tiling.batch, self.D)
        return pl.BlockSpec(shape, lambda h, b, i: (self.grid.at(i), h, 0, b, 0))

    def wide_block(self, n: int) -> pl.BlockSpec:
        """The block of [T, B, H n D]: the n D columns of a head for each token and sequence."""
        shape = (self.tiling.time, self.tiling.batch, n * self.D)
        return pl.BlockSpec(shape, lambda h, b, i: (self.grid.at(i), b, h))

    def matrix(self, n: int) -> pl.BlockSpec:
        """The block of [H, n, D, D]: fetched once a head, so that there is no second one to overlap with."""
        return pl.BlockSpec(
            (None, n, self.D, self.D), lambda h, b, i: (h, 0, 0, 0), pipeline_mode=pl.Buffered(1)
        )

    def bias(self, n: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, n, 1, self.D), lambda h, b, i: (h, 0, 0, 0))

    def state(self, n: int) -> pl.BlockSpec:
        """The block of [H, n, B, D]."""
        return pl.BlockSpec((None, n, self.tiling.batch, self.D), lambda h, b, i: (h, 0, b, 0))

    @property
    def starts(self) -> pl.BlockSpec:
        """The block of [T, B, 1]."""
        return pl.BlockSpec((self.tiling.time, self.tiling.batch, 1), lambda h, b, i: (self.grid.at(i), b, 0))

    @property
    def rows(self) -> int:
        """Sequences of whole blocks."""
        return self.batches * self.tiling.batch

    def tokens(self, n: int, dtype) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of what has `block`s."""
        return (self.grid.padded, self.H, n, self.rows, self.D), dtype

    def wide_tokens(self, n: int, dtype) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of what has `wide_block`s."""
        return (self.grid.padded, self.rows, self.H * n * self.D), dtype

    def states(self, n: int) -> tuple[tuple[int, ...], Any]:
        return (self.H, n, self.rows, self.D), F32

    def hold(self, launch: Launch, name: str, n: int) -> None:
        """Name scratch for n states."""
        launch.hold(name, (n, self.tiling.batch, self.D))

    def batch_first(self, x: Array) -> Array:
        """[T', H, n, B', D'] -> [B, T, H, n, D]."""
        x = trim(x, (self.T, *x.shape[1:3], self.B, self.call.gates.shape[-1]))
        return jnp.transpose(x, (3, 0, 1, 2, 4))

    def parameters(self) -> tuple[Array, Array]:
        """R [H, G, D', D'] and the bias [H, G, 1, D'], whole lanes."""
        R, bias, D = self.call.recurrent, self.call.bias[:, :, None], self.D
        return pad_to(R, (*R.shape[:2], D, D)), pad_to(bias, (*bias.shape[:3], D))

    def wide_time_first(self, x: Array, dtype) -> Array:
        """[B, T, H, n, D] -> [T', B', H n D'], whole blocks."""
        widened = pad_to(x.astype(dtype), (*x.shape[:-1], self.D)).reshape(self.B, self.T, -1)
        return pad_to(jnp.swapaxes(widened, 0, 1), self.wide_tokens(x.shape[3], dtype)[0])

    def wide_batch_first(self, x: Array) -> Array:
        """[T', B', H n D'] -> [B, T, H, n, D]."""
        x = jnp.swapaxes(x[: self.T, : self.B], 0, 1).reshape(self.B, self.T, self.H, -1, self.D)
        return x[..., : self.call.gates.shape[-1]]

    def batch_first_state(self, x: Array) -> Array:
        """[H, S, B', D'] -> [B, S, H, D]."""
        return trim(jnp.transpose(x, (2, 1, 0, 3)), self.call.initial_state.shape)

    def time_first_state(self, x: Array) -> Array:
        """[B, S, H, D] -> [H, S, B', D']."""
        return pad_to(jnp.transpose(x, (2, 1, 0, 3)), self.states(x.shape[1])[0])

    def time_first_starts(self) -> Array | None:
        """Ones where documents start, else zeros, [T', B', 1] in float32; None: all are whole."""
        if self.call.starts is None:
            return None
        return pad_to(self.call.starts.T[..., None].astype(F32), (self.grid.padded, self.rows, 1))

    def columns_of(self, n: int, d):
        """The place of channels `d` of row n in a `wide_block`."""
        return pl.ds(pl.multiple_of(n * self.D + d.start, LANES), d.size)

    def each_token(self, visit) -> None:
        """Call `visit(place in the block, whether the token exists; None: all do)` in the walk's order."""
        first = self.grid.first_token()

        def step(t, _):
            visit(t, first + t < self.T if self.grid.ragged else None)
            return 0

        self.grid.each_tile(1, step)

    def each_columns(self, visit) -> None:
        """Call `visit(slice of channels)` for all of them."""
        if len(self.columns) == 1:
            visit(pl.ds(0, self.D))
            return

        def step(i, _):
            visit(pl.ds(pl.multiple_of(i * self.tiling.columns, LANES), self.tiling.columns))
            return 0

        lax.fori_loop(0, len(self.columns), step, 0)


def _forward_kernel(
    *, x_ref, matrix_ref, bias_ref, first_ref, h_ref, last_ref, state_ref, operand_ref,
    starts_ref=None, reads_ref=None, cell: Cell, blocks: _Blocks,
):  # fmt: skip
    """state: float32; operand: h once more, in the matrix unit's dtype."""

    @blocks.grid.at_start()
    def _():
        state_ref[...] = first_ref[...]
        operand_ref[...] = first_ref[0].astype(operand_ref.dtype)

    def visit(t, exists):
        if starts_ref is not None:
            fresh = starts_ref[t] != 0
            state_ref[...] = jnp.where(fresh[None], 0.0, state_ref[...])
            operand_ref[...] = jnp.where(fresh, 0.0, operand_ref[...].astype(F32)).astype(operand_ref.dtype)

        def columns(d):
            r = [
                dot(operand_ref[...], matrix_ref[g, :, d]) + bias_ref[g, :, d].astype(F32)
                for g in range(cell.gates)
            ]
            x = [x_ref[t, :, blocks.columns_of(g, d)].astype(F32) for g in range(cell.gates)]
            before = [state_ref[s, :, d] for s in range(len(cell.states))]
            reads = [before[s] for s in cell.reads]
            if reads_ref is not None:
                for n, read in enumerate(reads):
                    reads_ref[t, n, :, d] = read
            state = cell.step(cell.combine(x, r), reads)
            h_ref[t, :, d] = state[0].astype(h_ref.dtype)
            for s, value in enumerate(state):
                state_ref[s, :, d] = value if exists is None else jnp.where(exists, value, before[s])

        blocks.each_columns(columns)
        operand_ref[...] = h_ref[t]

    blocks.each_token(visit)

    @blocks.grid.at_end()
    def _():
        last_ref[...] = state_ref[...]


def _backward_kernel(
    *, x_ref, before_ref, bias_ref, dh_ref, matrix_ref, dlast_ref,
    dgates_ref, dpre_ref, dfirst_ref, dstate_ref, pre_ref,
    reads_ref=None, starts_ref=None, cell: Cell, blocks: _Blocks,
):  # fmt: skip
    """The states' gradients, from token to token, and each token's share of the pre-activations'."""

    @blocks.grid.at_start()
    def _():
        dstate_ref[...] = dlast_ref[...]

    def pre_activations(i, _):
        """Fill in 128 channels of each gate, for all tokens of the block."""
        d = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        h = before_ref[...].reshape(-1, blocks.D)
        r = [dot(h, matrix_ref[g, :, d]) + bias_ref[g, :, d].astype(F32) for g in range(cell.gates)]
        x = [x_ref[:, :, blocks.columns_of(g, d)].astype(F32).reshape(-1, LANES) for g in range(cell.gates)]
        for p, value in enumerate(cell.combine(x, r)):
            pre_ref[:, p, :, d] = value.reshape(blocks.tiling.time, -1, LANES)
        return 0

    lax.fori_loop(0, blocks.D // LANES, pre_activations, 0)
    states = range(len(cell.states))

    def visit(t, exists):
        def pointwise(d):
            pre = [pre_ref[t, p, :, d] for p in range(cell.pre_activations)]
            reads = [reads_ref[t, n, :, d] for n in range(len(cell.reads))]
            dstate = [dstate_ref[s, :, d] for s in states]
            whole = (dstate[0] + dh_ref[t, :, d].astype(F32), *dstate[1:])
            dpre, dreads = cell.pullback(pre, reads, whole)
            sent = dict(zip(cell.reads, dreads, strict=True))
            dpre = [value if exists is None else jnp.where(exists, value, 0.0) for value in dpre]
            dpre = [value.astype(dpre_ref.dtype) for value in dpre]
            for p, value in enumerate(dpre):
                dpre_ref[t, p, :, d] = value
            for g, p in enumerate(cell.inputs):
                dgates_ref[t, :, blocks.columns_of(g, d)] = dpre[p]
            for s in states:
                value = sent.get(s, jnp.zeros_like(dstate[0]))
                dstate_ref[s, :, d] = value if exists is None else jnp.where(exists, value, dstate[s])

        def through_the_matrix(d):
            sent = sum(dot(dpre_ref[t, p], matrix_ref[g, d, :], "nt") for g, p in enumerate(cell.recurrent))
            dstate_ref[0, :, d] += sent

        blocks.each_columns(pointwise)
        blocks.each_columns(through_the_matrix)
        if starts_ref is not None:
            dstate_ref[...] = jnp.where((starts_ref[t] != 0)[None], 0.0, dstate_ref[...])

    blocks.each_token(visit)

    @blocks.grid.at_end()
    def _():
        dfirst_ref[...] = dstate_ref[...]
