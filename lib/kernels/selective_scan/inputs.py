"""The checked call of `selective_scan` is, once checked: the form that every backend takes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator, rates, reject
from ..common.documents import documents
from ..common.rows import Rows
from ..common.sharding import vary_like

KEPT = 128  # tokens between the states that the TPU's forward pass keeps for its gradient


class Inputs(NamedTuple):
    """Checked arguments: all but x, dt and z in the accumulator's dtype, zeros where one was left out."""

    x: Array  # [B, T, D]
    dt: Array  # [B, T, D], before its bias and softplus
    A: Array  # [D, N]
    B: Array  # [B, T, N]
    C: Array  # [B, T, N]
    D: Array  # [D]
    z: Array | None  # None | [B, T, D]
    dt_bias: Array  # [D]
    initial_state: Array  # [B, D, N]
    starts: Array | None  # None | int32 [B, T]: 1 where a document begins, but 0 at t = 0


def step_size(call: Inputs, softplus: bool) -> Array:
    """dt [B, T, D] as the recurrence has it, in the accumulator's dtype."""
    dt_BTD = call.dt.astype(call.A.dtype) + call.dt_bias[None, None]
    return jax.nn.softplus(dt_BTD) if softplus else dt_BTD


def no_states(call: Inputs) -> Array:
    """Zeros [B, T / KEPT, N, D], which nobody reads, where the TPU has the states before every KEPT tokens.

    For the branches of a program for several platforms return the same shapes.
    """
    batch, T, D = call.x.shape
    return vary_like(jnp.zeros((batch, -(-T // KEPT), call.A.shape[1], D), jnp.float32), call)


def finish(call: Inputs, y_BTD: Array) -> Array:
    """C h's way out: the skip, the gate, x's dtype."""
    y_BTD = y_BTD + call.D[None, None] * call.x.astype(y_BTD.dtype)
    if call.z is not None:
        y_BTD = y_BTD * jax.nn.silu(call.z.astype(y_BTD.dtype))
    return y_BTD.astype(call.x.dtype)


def in_reading_order(call: Inputs, read: Rows, softplus: bool) -> Inputs:
    """The call as its rows are read: tokens past a row's end have dt = 0, which leaves the state as it is."""
    packed = documents(read.ids, *read.shape)
    if read.lengths is not None and not softplus:
        call = call._replace(dt=step_size(call, False), dt_bias=jnp.zeros_like(call.dt_bias))
    return call._replace(
        x=read.read(call.x),
        # The softplus of -1e4 is 0, and its slope, with any bias that a model has.
        dt=read.read(call.dt, -1e4 if softplus else 0),
        B=read.read(call.B),
        C=read.read(call.C),
        z=None if call.z is None else read.read(call.z),
        starts=None if packed is None else packed.starts.astype(jnp.int32),
    )


def check(x, dt, A, B, C, D, z, dt_bias, initial_state, segment_ids) -> Inputs:
    """Raise ValueError naming the argument that can't be right, or return the checked `Inputs`."""
    floats = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_state=initial_state)
    for name, array in floats.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            reject(name, array, "a floating dtype")
    if x.ndim != 3:
        reject("x", x, "[batch, time, D]")
    batch, T, width = x.shape
    if A.ndim != 2 or A.shape[0] != width:
        reject("A", A, f"[{width}, N] (x's D)")
    N = A.shape[1]
    for name, array in (("x", x), ("A", A)):
        if 0 in array.shape:
            reject(name, array, "every size >= 1")
    shapes = dict(
        dt=x.shape, z=x.shape, B=(batch, T, N), C=(batch, T, N), D=(width,), dt_bias=(width,),
        initial_state=(batch, width, N),
    )  # fmt: skip
    for name, shape in shapes.items():
        if floats[name] is not None and floats[name].shape != shape:
            reject(name, floats[name], str(list(shape)))
    packed = documents(segment_ids, batch, T)
    starts = None if packed is None else packed.starts.astype(jnp.int32)
    dtype = accumulator(x.dtype, dt.dtype)

    def wide(array, shape):
        return jnp.zeros(shape, dtype) if array is None else array.astype(dtype)

    small = {name: wide(floats[name], shape) for name, shape in shapes.items() if name not in ("dt", "z")}
    return Inputs(x=x, dt=dt, A=rates(A, dtype), z=z, starts=starts, **small)
