"""The scan on Hopper: a warpgroup walks 128 channels of one sequence, a thread holds its channel's states.

Tiles of tokens come by TMA, the next ones while a thread walks down its column of this one; B and C, the same
for all channels, are scalars in shared memory. A's log is base 2 from here on: exp(dt A) = 2^(dt A2). The
gradient first finds the states before every GPU_BACKWARD tokens, then visits those tiles from the last.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common import compat
from ..common.hopper import F32, launch
from ..common.tiling import round_up
from .inputs import Inputs, no_states, step_size
from .pallas_gpu_backward import backward_body
from .pallas_gpu_blocks import CHANNELS, Plan, Walk, step_sizes
from .tiling import GPU_BACKWARD, GPU_FORWARD, GPU_MOST_STATES

LOG2_E = float(np.log2(np.e))
NO_STEP = -1e30  # softplus of it is zero


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    for x in (call.x, call.dt, *(() if call.z is None else (call.z,))):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"the GPU kernel reads float32 and bfloat16, not {x.dtype}"
    if call.A.shape[1] > GPU_MOST_STATES:
        return f"N={call.A.shape[1]}: at most {GPU_MOST_STATES} states fit a thread's registers"
    return compat.local_gpu_lacks_mosaic()


def forward(call: Inputs, softplus: bool, keep: bool = False, *, interpret: bool) -> tuple[Array, ...]:
    """y [B, T, D] in x's dtype, the final state [B, D, N] in float32; with `keep` also `no_states`."""
    plan, arrays = _arrays(call, softplus, GPU_FORWARD, interpret)
    arrays |= {"state": _state(call.initial_state, plan)}
    results = {"y": arrays["x"], "final": arrays["state"]}
    got = _run("selective_scan", forward_body, plan, arrays, results)
    results = _trim(got["y"], call), _trim_state(got["final"], call)
    return (*results, no_states(call)) if keep else results


def backward(
    call: Inputs, states: Array, cotangents: tuple[Array, Array], softplus: bool, *, interpret: bool
) -> Inputs:
    """The gradient of each input, in its shape and dtype; None where the input is None."""
    del states
    D, N = call.A.shape
    T = call.x.shape[1]
    plan, arrays = _arrays(call, softplus, GPU_BACKWARD, interpret)
    B, time, width = plan.shape
    state = _state(call.initial_state, plan)
    states = jax.ShapeDtypeStruct((B, plan.steps, plan.states, width), F32)
    inputs = {n: x for n, x in arrays.items() if n not in ("z", "D")} | {"state": state}
    states = _run("selective_scan_states", states_body, plan, inputs, {"states": states})["states"]

    arrays |= {"dy": _fit(cotangents[0].astype(call.x.dtype), plan.shape)}
    arrays |= {"d_final": _state(cotangents[1], plan), "states": states}
    columns = jax.ShapeDtypeStruct((B, width // CHANNELS, time * plan.states), F32)
    row = jax.ShapeDtypeStruct((B, width), F32)
    results = {f"d{n}": arrays[n] for n in ("x", "dt", "z") if n in arrays}
    results |= {"dB": columns, "dC": columns, "dD": row, "ddt_bias": row, "dA": state, "dstate": state}
    got = _run("selective_scan_backward", backward_body, plan, arrays, results)
    d_columns = {n: got[f"d{n}"].sum(1).reshape(B, time, -1)[:, :T, :N] for n in ("B", "C")}
    return Inputs(
        x=_trim(got["dx"], call),
        dt=_trim(got["ddt"], call).astype(call.dt.dtype),
        A=got["dA"].sum(0)[:N, :D].T,
        D=got["dD"].sum(0)[:D],
        z=None if call.z is None else _trim(got["dz"], call),
        dt_bias=got["ddt_bias"].sum(0)[:D],
        initial_state=_trim_state(got["dstate"], call),
        starts=None,
        **d_columns,
    )


def forward_body(plan: Plan, walk: Walk):
    """y and the final state."""
    A, h = walk.rows("A"), walk.rows("state")
    bias, D = walk.row("dt_bias"), walk.row("D")

    def step(i, slot, h):
        for r in range(plan.tokens):
            x = walk.tile("x", slot, r)
            dt = step_sizes(plan, walk.tile("dt", slot, r) + bias)
            source, keep, y, after = dt * x, walk.keep(slot, r), D * x, []
            for n in range(plan.states):
                h_n = walk.decay(dt, A[n], keep) * h[n] + source * walk.column(slot, r, n)
                y += h_n * walk.column(slot, r, plan.states + n)
                after.append(h_n)
            h = tuple(after)
            if plan.gated:
                z = walk.tile("z", slot, r)
                y *= z * jax.nn.sigmoid(z)
            walk.put("y", slot, r, y)
        return h

    walk.write_rows("final", walk.each_step(step, h))


def states_body(plan: Plan, walk: Walk):
    """The states before each tile of tokens."""
    A, h = walk.rows("A"), walk.rows("state")
    bias = walk.row("dt_bias")

    def step(i, slot, h):
        walk.put_rows("states", slot, h)
        for r in range(plan.tokens):
            dt = step_sizes(plan, walk.tile("dt", slot, r) + bias)
            source, keep = dt * walk.tile("x", slot, r), walk.keep(slot, r)
            h = tuple(
                walk.decay(dt, A[n], keep) * h[n] + source * walk.column(slot, r, n)
                for n in range(plan.states)
            )
        return h

    walk.each_step(step, h)


def _arrays(call: Inputs, softplus: bool, tokens: int, interpret: bool) -> tuple[Plan, dict[str, Array]]:
    """The operands of every kernel, in whole tiles."""
    B, T, D = call.x.shape
    shape = (B, round_up(T, tokens), round_up(D, CHANNELS))
    states = round_up(call.A.shape[1], 4)  # rows of whole 16 bytes
    plan = Plan(shape, states, tokens, softplus, call.z is not None, call.starts is not None, interpret)
    columns = [_fit(x, (B, shape[1], states)) for x in (call.B, call.C)]
    if call.starts is not None:
        keep = 1.0 - call.starts.astype(F32)[..., None]
        columns.append(_fit(keep, (B, shape[1], 4), 1.0))
    # Without a softplus there is nothing to fuse: the bias is added here.
    dt = _fit(call.dt, shape, NO_STEP) if softplus else _fit(step_size(call, False), shape)
    bias = call.dt_bias if softplus else jnp.zeros_like(call.dt_bias)
    arrays = {
        "x": _fit(call.x, shape),
        "dt": dt,
        "columns": jnp.concatenate(columns, axis=2),
        "A": _fit(call.A.T * LOG2_E, (states, shape[2])),
        "D": _fit(call.D, shape[2:]),
        "dt_bias": _fit(bias, shape[2:]),
    }
    if call.z is not None:
        arrays["z"] = _fit(call.z, shape)
    return plan, arrays


def _run(name: str, body, plan: Plan, arrays: dict, results: dict) -> dict[str, Array]:
    names = [*arrays, *results]
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in results.items()}

    def kernel(*refs, **scratch):
        body(plan, Walk(plan, dict(zip(names, refs, strict=True)), scratch, tuple(arrays), tuple(results)))

    got = plgpu.kernel(
        kernel,
        out_type=tuple(like.values()),
        scratch_types=Walk.scratch(plan, arrays, like),
        grid=(plan.shape[0], plan.shape[2] // CHANNELS),
        grid_names=("b", "d"),
        **launch(name, interpret=plan.interpret),
    )(*arrays.values())
    return dict(zip(results, got, strict=True))


def _fit(x: Array, shape, value: float = 0.0) -> Array:
    widths = [(0, to - n) for n, to in zip(x.shape, shape, strict=True)]
    return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype)) if any(w for _, w in widths) else x


def _state(state: Array, plan: Plan) -> Array:
    return _fit(jnp.swapaxes(state, 1, 2).astype(F32), (plan.shape[0], plan.states, plan.shape[2]))


def _trim(x: Array, call: Inputs) -> Array:
    _, T, D = call.x.shape
    return x[:, :T, :D]


def _trim_state(state: Array, call: Inputs) -> Array:
    D, N = call.A.shape
    return jnp.swapaxes(state[:, :N, :D], 1, 2)
