"""The checked call of `rnn` is, once checked: the form that every backend takes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator, operand_dtype, reject
from ..common.documents import documents
from ..common.rows import Rows
from .cells import CELLS, Cell, find


class Inputs(NamedTuple):
    """Checked arguments."""

    gates: Array  # [B, T, H, G, D]: W x
    recurrent: Array  # [H, G, D, D]: a gate's R h is h @ recurrent[head, gate]
    bias: Array  # [H, G, D]
    initial_state: Array  # [B, S, H, D], in the accumulator's dtype
    starts: Array | None  # None | bool [B, T]: the state is zeros before these tokens; never before the first

    @property
    def cell(self) -> Cell:
        """The one cell with this many gates and states."""
        counts = self.gates.shape[3], self.initial_state.shape[1]
        return next(cell for cell in CELLS.values() if counts == (cell.gates, len(cell.states)))


def check(gates, recurrent, bias, initial_state, segment_ids, *, cell: str) -> Inputs:
    """Raise ValueError naming the argument that can't be right, or return the checked `Inputs`."""
    G, S = find(cell).gates, len(find(cell).states)
    floats = dict(gates=gates, recurrent=recurrent, bias=bias, initial_state=initial_state)
    for name, x in floats.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            reject(name, x, "a floating dtype")
    if gates.ndim != 5 or gates.shape[3] != G:
        reject("gates", gates, f"[batch, time, heads, {G}, D] (of {G} gates: cell={cell!r})")
    if 0 in gates.shape:
        reject("gates", gates, "every size >= 1")
    B, T, H, _, D = gates.shape
    if recurrent.shape != (H, G, D, D):
        reject("recurrent", recurrent, f"[{H}, {G}, {D}, {D}]")
    if bias is not None and bias.shape != (H, G, D):
        reject("bias", bias, f"[{H}, {G}, {D}]")
    for name, x in (("recurrent", recurrent), ("bias", bias)):
        if x is not None and x.dtype != gates.dtype:
            reject(name, x, f"gates' dtype {gates.dtype}")
    if initial_state is not None and initial_state.shape != (B, S, H, D):
        reject("initial_state", initial_state, f"[{B}, {S}, {H}, {D}] ({', '.join(find(cell).states)})")
    packed = documents(segment_ids, B, T)
    starts = None if packed is None else packed.starts
    dtype = accumulator(gates.dtype)
    recurrent = recurrent.astype(operand_dtype(recurrent.dtype))  # of float16: states may be above its range
    state = jnp.zeros((B, S, H, D), dtype) if initial_state is None else initial_state.astype(dtype)
    bias = jnp.zeros((H, G, D), gates.dtype) if bias is None else bias
    return Inputs(gates, recurrent, bias, state, starts)


def in_reading_order(call: Inputs, read: Rows) -> Inputs:
    """The call as its rows are read, with zeros past their ends."""
    packed = documents(read.ids, *read.shape)
    return call._replace(gates=read.read(call.gates), starts=None if packed is None else packed.starts)
