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
from ..common.arguments import pad_to, trim
from ..common.hopper import F32, launch
from ..common.tiling import round_up
from .inputs import Inputs, no_states, step_size
from .pallas_gpu_backward import backward_body
from .pallas_gpu_blocks import CHANNELS, Program, Spec, step_sizes
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
    spec, arrays = _arrays(call, softplus, GPU_FORWARD, interpret)
    arrays |= {"state": _state(call.initial_state, spec)}
    results = {"y": arrays["x"], "final": arrays["state"]}
    got = _run("selective_scan", forward_body, spec, arrays, results)
    results = trim(got["y"], call.x.shape), _trim_state(got["final"], call)
    return (*results, no_states(call)) if keep else results


def backward(
    call: Inputs, states: Array, cotangents: tuple[Array, Array], softplus: bool, *, interpret: bool
) -> Inputs:
    """The gradient of each input, in its shape and dtype; None where the input is None."""
    del states
    D, N = call.A.shape
    T = call.x.shape[1]
    spec, arrays = _arrays(call, softplus, GPU_BACKWARD, interpret)
    B, time, width = spec.shape
    state = _state(call.initial_state, spec)
    states = jax.ShapeDtypeStruct((B, spec.steps, spec.states, width), F32)
    inputs = {n: x for n, x in arrays.items() if n not in ("z", "D")} | {"state": state}
    states = _run("selective_scan_states", states_body, spec, inputs, {"states": states})["states"]

    arrays |= {"dy": pad_to(cotangents[0].astype(call.x.dtype), spec.shape)}
    arrays |= {"d_final": _state(cotangents[1], spec), "states": states}
    columns = jax.ShapeDtypeStruct((B, width // CHANNELS, time * spec.states), F32)
    row = jax.ShapeDtypeStruct((B, width), F32)
    results = {f"d{n}": arrays[n] for n in ("x", "dt", "z") if n in arrays}
    results |= {"dB": columns, "dC": columns, "dD": row, "ddt_bias": row, "dA": state, "dstate": state}
    got = _run("selective_scan_backward", backward_body, spec, arrays, results)
    d_columns = {n: got[f"d{n}"].sum(1).reshape(B, time, -1)[:, :T, :N] for n in ("B", "C")}
    return Inputs(
        x=trim(got["dx"], call.x.shape),
        dt=trim(got["ddt"], call.x.shape).astype(call.dt.dtype),
        A=got["dA"].sum(0)[:N, :D].T,
        D=got["dD"].sum(0)[:D],
        z=None if call.z is None else trim(got["dz"], call.x.shape),
        dt_bias=got["ddt_bias"].sum(0)[:D],
        initial_state=_trim_state(got["dstate"], call),
        starts=None,
        **d_columns,
    )


def forward_body(spec: Spec, program: Program):
    """y and the final state."""
    A, h = program.rows("A"), program.rows("state")
    bias, D = program.row("dt_bias"), program.row("D")

    def step(i, slot, h):
        for r in range(spec.tokens):
            x = program.tile("x", slot, r)
            dt = step_sizes(spec, program.tile("dt", slot, r) + bias)
            source, keep, y, after = dt * x, program.keep(slot, r), D * x, []
            for n in range(spec.states):
                h_n = jnp.exp2(dt * A[n]) * program.fresh(h[n], keep) + source * program.column(slot, r, n)
                y += h_n * program.column(slot, r, spec.states + n)
                after.append(h_n)
            h = tuple(after)
            if spec.gated:
                z = program.tile("z", slot, r)
                y *= z * jax.nn.sigmoid(z)
            program.put("y", slot, r, y)
        return h

    program.write_rows("final", program.each_step(step, h))


def states_body(spec: Spec, program: Program):
    """The states before each tile of tokens."""
    A, h = program.rows("A"), program.rows("state")
    bias = program.row("dt_bias")

    def step(i, slot, h):
        program.put_rows("states", slot, h)
        for r in range(spec.tokens):
            dt = step_sizes(spec, program.tile("dt", slot, r) + bias)
            source, keep = dt * program.tile("x", slot, r), program.keep(slot, r)
            h = tuple(
                jnp.exp2(dt * A[n]) * program.fresh(h[n], keep) + source * program.column(slot, r, n)
                for n in range(spec.states)
            )
        return h

    program.each_step(step, h)


def _arrays(call: Inputs, softplus: bool, tokens: int, interpret: bool) -> tuple[Spec, dict[str, Array]]:
    """The operands of every kernel, in whole tiles."""
    B, T, D = call.x.shape
    shape = (B, round_up(T, tokens), round_up(D, CHANNELS))
    states = round_up(call.A.shape[1], 4)  # rows of whole 16 bytes
    spec = Spec(shape, states, tokens, softplus, call.z is not None, call.starts is not None, interpret)
    columns = [pad_to(x, (B, shape[1], states)) for x in (call.B, call.C)]
    if call.starts is not None:
        keep = 1.0 - call.starts.astype(F32)[..., None]
        columns.append(pad_to(keep, (B, shape[1], 4), 1.0))
    # Without a softplus there is nothing to fuse: the bias is added here.
    dt = pad_to(call.dt, shape, NO_STEP) if softplus else pad_to(step_size(call, False), shape)
    bias = call.dt_bias if softplus else jnp.zeros_like(call.dt_bias)
    arrays = {
        "x": pad_to(call.x, shape),
        "dt": dt,
        "columns": jnp.concatenate(columns, axis=2),
        "A": pad_to(call.A.T * LOG2_E, (states, shape[2])),
        "D": pad_to(call.D, shape[2:]),
        "dt_bias": pad_to(bias, shape[2:]),
    }
    if call.z is not None:
        arrays["z"] = pad_to(call.z, shape)
    return spec, arrays


def _run(name: str, body, spec: Spec, arrays: dict, results: dict) -> dict[str, Array]:
    names = [*arrays, *results]
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in results.items()}

    def kernel(*refs, **scratch):
        body(spec, Program(spec, dict(zip(names, refs, strict=True)), scratch, tuple(arrays), tuple(results)))

    got = plgpu.kernel(
        kernel,
        out_type=tuple(like.values()),
        scratch_types=Program.scratch(spec, arrays, like),
        grid=(spec.shape[0], spec.shape[2] // CHANNELS),
        grid_names=("b", "d"),
        **launch(name, interpret=spec.interpret),
    )(*arrays.values())
    return dict(zip(results, got, strict=True))


def _state(state: Array, spec: Spec) -> Array:
    return pad_to(jnp.swapaxes(state, 1, 2).astype(F32), (spec.shape[0], spec.states, spec.shape[2]))


def _trim_state(state: Array, call: Inputs) -> Array:
    return trim(jnp.swapaxes(state, 1, 2), call.initial_state.shape)
