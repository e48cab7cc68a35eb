"""The cells on Hopper (Mosaic GPU): a block of threads keeps a head's R in shared memory over all steps.

Channels are rows and sequences are columns, so that R is wgmma's left operand and a few sequences fill its
right one; the states stay in registers. Gates come by TMA, some tokens ahead. The walk back gets
pre-activations from one product over all tokens before it, and R's gradient is one product after it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import compat, hopper
from ..common.arguments import pad_to
from ..common.hopper import F32, Pipeline, Tiles, along_rows, swizzled
from ..common.tiling import round_up
from .cells import Cell
from .inputs import Inputs
from .tiling import ROWS, GPUTiling, Shape, for_gpu
from .tokens import matrix_gradients, pre_activations

BF16 = jnp.bfloat16


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if call.gates.dtype != BF16:
        return f"the GPU kernel's products are bfloat16's, not {call.gates.dtype}'s"
    reasons = (_tiling(call, backward)[1] for backward in (False, True))
    return next((reason for reason in reasons if reason is not None), None) or compat.local_gpu_lacks_mosaic()


def forward(call: Inputs, keep: bool = False, *, interpret: bool) -> tuple[Array, ...]:
    """h [B, T, H, D], the last state [B, S, H, D]; with `keep` also what steps read [T, H, R, B, D]."""
    B, T, H, G, D = call.gates.shape
    cell = call.cell
    program = _Program(call, interpret, backward=False)
    S, R = len(cell.states), len(cell.reads) if keep else 0
    bias_HGD = jnp.pad(call.bias.astype(F32), ((0, 0), (0, 0), (0, program.D - D)))
    operands = [
        program.channels_first(call.gates, BF16),
        program.matrices(jnp.swapaxes(call.recurrent, 2, 3)),
        bias_HGD,
        program.state_in(call.initial_state),
        *program.starts(),
    ]
    h, state, *reads = plgpu.kernel(
        partial(_forward_kernel, cell=cell, program=program, keep=R > 0),
        out_type=[program.tokens(1, BF16), program.states(S), *([program.tokens(R, F32)] if R else [])],
        scratch_types=dict(
            matrix=program.tile((G * program.D, program.D), BF16),
            bias=plgpu.SMEM((G, program.D), F32),
            states=program.tile((S * program.D, program.N), F32),
            operand=program.tile((2, program.D, program.N), BF16),
            x_tile=program.tile((program.stages, G * program.D, program.N), BF16),
            start_tile=program.tile((program.stages, program.D, program.N), BF16) if program.packed else None,
            once=plgpu.Barrier(num_arrivals=2 + G),
            arrived=plgpu.Barrier(num_arrivals=1 + program.packed, num_barriers=program.stages),
        ),
        **program.launch("rnn_forward"),
    )(*operands)
    results = program.batch_first(h, 1)[:, :, :, 0], program.state_out(state)
    if not keep:
        return results
    if not R:
        return (*results, jnp.zeros((T, H, 0, B, D), F32))
    return (*results, jnp.transpose(program.batch_first(reads[0], R), (1, 2, 3, 0, 4)))


def backward(
    call: Inputs, h: Array, reads: Array, cotangents: tuple[Array, Array], *, interpret: bool
) -> Inputs:
    """The gradients, as `Inputs`, from what `forward` returned."""
    cell = call.cell
    program = _Program(call, interpret, backward=True)
    P, S, R, G = cell.pre_activations, len(cell.states), len(cell.reads), cell.gates
    dh, dstate = cotangents
    operands = [
        program.channels_first(pre_activations(call, h), F32),
        program.channels_first(dh[:, :, :, None], BF16),
        program.matrices(call.recurrent),
        program.state_in(dstate),
        *([program.channels_first(jnp.transpose(reads, (3, 0, 1, 2, 4)), F32)] if R else []),
        *program.starts(),
    ]
    dpre, dstate = plgpu.kernel(
        partial(_backward_kernel, cell=cell, program=program),
        out_type=[program.tokens(P, BF16), program.states(S)],
        scratch_types=dict(
            matrix=program.tile((G * program.D, program.D), BF16),
            pre_tile=program.tile((program.stages, P * program.D, program.N), F32),
            dh_tile=program.tile((program.stages, program.D, program.N), BF16),
            read_tile=program.tile((program.stages, R * program.D, program.N), F32) if R else None,
            start_tile=program.tile((program.stages, program.D, program.N), BF16) if program.packed else None,
            dpre_tile=program.tile((2, P * program.D, program.N), BF16),
            once=plgpu.Barrier(num_arrivals=2),
            arrived=plgpu.Barrier(num_arrivals=2 + (R > 0) + program.packed, num_barriers=program.stages),
        ),
        **program.launch("rnn_backward"),
    )(*operands)
    return matrix_gradients(call, h, program.batch_first(dpre, P))._replace(
        initial_state=program.state_out(dstate)
    )


def _tiling(call: Inputs, backward: bool) -> tuple[GPUTiling | None, str | None]:
    B, T, H, _, D = call.gates.shape
    return for_gpu(call.cell, Shape(B, T, H, D, 2, call.starts is not None), backward=backward)


class _Program:
    """The grid (batch, head), the walk over time, and arrays [T, H, n, D', B'] as matrices around them."""

    def __init__(self, call: Inputs, interpret: bool, *, backward: bool):
        tiling, _ = _tiling(call, backward)
        assert tiling is not None  # unsupported_reason
        self.call, self.interpret = call, interpret
        self.B, self.T, self.H, _, size = call.gates.shape
        self.N, self.stages = tiling.batch, min(tiling.stages, self.T)
        self.pipeline = Pipeline(self.T, self.stages, ahead=self.stages, backwards=backward)
        self.D = round_up(size, ROWS)
        self.batches = pl.cdiv(self.B, self.N)
        self.packed = call.starts is not None
        self.tiles = Tiles(interpret)

    def tile(self, shape: tuple[int, ...], dtype):
        """Shared memory for the copy engine and wgmma, whose operands are swizzled alike."""
        return swizzled(shape, dtype, min(128, self.N * jnp.dtype(dtype).itemsize))

    def tokens(self, n: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.T * self.H * n * self.D, self.batches * self.N), dtype)

    def states(self, n: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.H * n * self.D, self.batches * self.N), F32)

    def channels_first(self, x: Array, dtype) -> Array:
        """[B, T, H, n, D] -> [T * H * n * D', B']."""
        x = jnp.transpose(x.astype(dtype), (1, 2, 3, 4, 0))
        return pad_to(x, (*x.shape[:3], self.D, self.batches * self.N)).reshape(-1, self.batches * self.N)

    def batch_first(self, x: Array, n: int) -> Array:
        """[T * H * n * D', B'] -> [B, T, H, n, D]."""
        x = x.reshape(self.T, self.H, n, self.D, -1)[..., : self.call.gates.shape[-1], : self.B]
        return jnp.transpose(x, (4, 0, 1, 2, 3))

    def state_in(self, x: Array) -> Array:
        """[B, S, H, D] -> [H * S * D', B']."""
        x = jnp.transpose(x.astype(F32), (2, 1, 3, 0))
        return pad_to(x, (*x.shape[:2], self.D, self.batches * self.N)).reshape(-1, self.batches * self.N)

    def state_out(self, x: Array) -> Array:
        """[H * S * D', B'] -> [B, S, H, D]."""
        x = x.reshape(self.H, -1, self.D, x.shape[1])[:, :, : self.call.gates.shape[-1], : self.B]
        return jnp.transpose(x, (3, 1, 0, 2))

    def matrices(self, x: Array) -> Array:
        """[H, G, D, D] -> [H * G * D', D']."""
        return pad_to(x, (*x.shape[:2], self.D, self.D)).reshape(-1, self.D)

    def starts(self) -> list[Array]:
        """[T * D', B'], the same in every channel, if there are any."""
        if not self.packed:
            return []
        starts_TB = pad_to(self.call.starts.T.astype(BF16), (self.T, self.batches * self.N))
        return [jnp.repeat(starts_TB, self.D, axis=0)]

    def launch(self, name: str) -> dict:
        return dict(
            grid=(self.batches, self.H),
            grid_names=("b", "h"),
            **hopper.launch(name, interpret=self.interpret, approx_math=True),
        )

    # Inside a kernel.

    def here(self) -> tuple[Array, pl.Slice]:
        """This block's head, and the slice of its sequences."""
        return lax.axis_index("h"), pl.ds(lax.axis_index("b") * self.N, self.N)

    def rows(self, place, n: int) -> pl.Slice:
        """n * D' rows of a matrix of such groups of rows."""
        return pl.ds(place * (n * self.D), n * self.D)

    def part(self, p: int, d: int) -> pl.Slice:
        """In such a group: of array p, the ROWS channels from d on."""
        return pl.ds(p * self.D + d, ROWS)

    def blocks(self) -> range:
        """First channels of what registers hold at a time."""
        return range(0, self.D, ROWS)

    def each_token(self, fetch, visit, carry):
        """Walk with `stages` tokens on their way: `visit(t, slot, i, what fetches the next token, carry)`."""
        pipeline = self.pipeline
        pipeline.start(fetch)

        def step(i, carry):
            return visit(pipeline.at(i), pipeline.slot(i), i, lambda: pipeline.refill(i, fetch), carry)

        return lax.fori_loop(0, self.T, step, carry)


def _forward_kernel(
    x_ref, matrix_ref, bias_ref, first_ref, *refs,
    cell: Cell, program: _Program, keep: bool,
    matrix, bias, states, operand, x_tile, start_tile, once, arrived,
):  # fmt: skip
    start_ref, *refs = refs if program.packed else (None, *refs)
    h_ref, last_ref, *refs = refs
    (h, lanes), tiles = program.here(), program.tiles
    G, S, R, H = cell.gates, len(cell.states), len(cell.reads), program.H
    plgpu.copy_gmem_to_smem(matrix_ref.at[program.rows(h, G)], matrix, once)
    plgpu.copy_gmem_to_smem(first_ref.at[program.rows(h, S), lanes], states, once)
    for g in range(G):
        plgpu.copy_gmem_to_smem(bias_ref.at[h, g], bias.at[g], once)
    plgpu.barrier_wait(once)

    def fetch(t, slot):
        plgpu.copy_gmem_to_smem(
            x_ref.at[program.rows(t * H + h, G), lanes], x_tile.at[slot], arrived.at[slot]
        )
        if program.packed:
            plgpu.copy_gmem_to_smem(
                start_ref.at[program.rows(t, 1), lanes], start_tile.at[slot], arrived.at[slot]
            )

    carry = tuple(
        tuple(tiles.load(states.at[program.part(s, d)]) for s in range(S)) for d in program.blocks()
    )
    for d, block in zip(program.blocks(), carry, strict=True):
        operand[0, program.part(0, d)] = block[0].astype(BF16)
    plgpu.commit_smem()

    def visit(t, slot, i, fetch_next, carry):
        now, after = lax.rem(i, 2), lax.rem(i + 1, 2)
        plgpu.barrier_wait(arrived.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the token before: tiles may be written again
        moved = []
        for d, state in zip(program.blocks(), carry, strict=True):
            zeros = tiles.full((ROWS, program.N), 0)
            products = ((zeros, (matrix.at[program.part(g, d)], operand.at[now])) for g in range(G))
            r = tiles.add_each(*products)
            if program.packed:
                fresh = tiles.load(start_tile.at[slot, program.part(0, d)]) > 0.5
                r, state = ([jnp.where(fresh, zeros, y) for y in ys] for ys in (r, state))
            biases = (tiles.load(bias.at[g, pl.ds(d, ROWS)], hopper.ROWS) for g in range(G))
            r = [y + along_rows(b, y.shape) for y, b in zip(r, biases, strict=True)]
            x = [tiles.load(x_tile.at[slot, program.part(g, d)]) for g in range(G)]
            reads = [state[s] for s in cell.reads]
            if keep:
                for n, read in enumerate(reads):
                    states[program.part(n, d)] = read
            state = cell.step(cell.combine(x, r), reads)
            operand[after, program.part(0, d)] = state[0].astype(BF16)
            moved.append(tuple(state))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(operand.at[after], h_ref.at[program.rows(t * H + h, 1), lanes])
        if keep:
            kept = states.at[pl.ds(0, R * program.D)]
            plgpu.copy_smem_to_gmem(kept, refs[0].at[program.rows(t * H + h, R), lanes])
        fetch_next()
        return tuple(moved)

    carry = program.each_token(fetch, visit, carry)
    _write_states(carry, states, last_ref, h, lanes, program)


def _backward_kernel(
    pre_ref, dh_ref, matrix_ref, dlast_ref, *refs,
    cell: Cell, program: _Program,
    matrix, pre_tile, dh_tile, read_tile, start_tile, dpre_tile, once, arrived,
):  # fmt: skip
    read_ref, *refs = refs if cell.reads else (None, *refs)
    start_ref, *refs = refs if program.packed else (None, *refs)
    dpre_ref, dfirst_ref = refs
    (h, lanes), tiles = program.here(), program.tiles
    G, P, S, R, H = cell.gates, cell.pre_activations, len(cell.states), len(cell.reads), program.H
    states = pre_tile.at[0, pl.ds(0, S * program.D)]  # memory for them before the walk and after it: S <= P
    plgpu.copy_gmem_to_smem(matrix_ref.at[program.rows(h, G)], matrix, once)
    plgpu.copy_gmem_to_smem(dlast_ref.at[program.rows(h, S), lanes], states, once)
    plgpu.barrier_wait(once)
    fetched = [(pre_ref, pre_tile, P), (dh_ref, dh_tile, 1), (read_ref, read_tile, R)]

    def fetch(t, slot):
        for ref, tile, n in fetched if R else fetched[:2]:
            plgpu.copy_gmem_to_smem(
                ref.at[program.rows(t * H + h, n), lanes], tile.at[slot], arrived.at[slot]
            )
        if program.packed:
            plgpu.copy_gmem_to_smem(
                start_ref.at[program.rows(t, 1), lanes], start_tile.at[slot], arrived.at[slot]
            )

    carry = tuple(
        tuple(tiles.load(states.at[program.part(s, d)]) for s in range(S)) for d in program.blocks()
    )
    plgpu.commit_smem()  # every thread has read them

    def visit(t, slot, i, fetch_next, carry):
        now = lax.rem(i, 2)
        plgpu.barrier_wait(arrived.at[slot])
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        moved = []
        for d, dstate in zip(program.blocks(), carry, strict=True):
            pre = [tiles.load(pre_tile.at[slot, program.part(p, d)]) for p in range(P)]
            reads = [tiles.load(read_tile.at[slot, program.part(n, d)]) for n in range(R)]
            dh = dstate[0] + tiles.load(dh_tile.at[slot, program.part(0, d)])
            dpre, dreads = cell.pullback(pre, reads, (dh, *dstate[1:]))
            for p in range(P):
                dpre_tile[now, program.part(p, d)] = dpre[p].astype(BF16)
            sent = dict(zip(cell.reads, dreads, strict=True))
            moved.append([sent.get(s, tiles.full((ROWS, program.N), 0)) for s in range(S)])
        starts = (
            [tiles.load(start_tile.at[slot, program.part(0, d)]) for d in program.blocks()]
            if program.packed
            else []
        )
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dpre_tile.at[now], dpre_ref.at[program.rows(t * H + h, P), lanes])
        fetch_next()
        for k, d in enumerate(program.blocks()):
            whole = (pl.ds(p * program.D, program.D) for p in cell.recurrent)
            products = (
                (matrix.at[program.part(g, d)], dpre_tile.at[now, rows]) for g, rows in enumerate(whole)
            )
            moved[k][0] = tiles.add_products(moved[k][0], *products)
            if program.packed:
                moved[k] = [jnp.where(starts[k] > 0.5, 0.0, y) for y in moved[k]]
        return tuple(map(tuple, moved))

    carry = program.each_token(fetch, visit, carry)
    _write_states(carry, states, dfirst_ref, h, lanes, program)


def _write_states(carry, states, ref, h, lanes, program: _Program) -> None:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for d, block in zip(program.blocks(), carry, strict=True):
        for s, value in enumerate(block):
            states[program.part(s, d)] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(states, ref.at[program.rows(h, len(carry[0])), lanes])
    plgpu.wait_smem_to_gmem(0)
