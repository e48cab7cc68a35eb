"""The scan on TPU: channels on lanes, states on sublanes, token after token, states in VMEM between blocks.

A's log is base 2 from here on: exp(dt A) = 2^(dt A2). The gradient visits blocks of time from the last: from
the state before a block, which the forward pass keeps for it, it computes the others anew and walks back over
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .inputs import KEPT, Inputs, step_size
from .pallas_tpu_backward import backward_kernel
from .pallas_tpu_blocks import F32, Plan
from .pallas_tpu_forward import forward_kernel
from .tiling import LANES, SUBLANES, TPU_MOST_STATES, TPUTiling, for_tpu, round_up

LOG2_E = float(np.log2(np.e))
NO_STEP = -1e30  # softplus of it is zero
VMEM_LIMIT = 64 << 20


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    for x in (call.x, call.dt, *(() if call.z is None else (call.z,))):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"the TPU kernel reads float32 and bfloat16, not {x.dtype}"
    if call.A.shape[1] > TPU_MOST_STATES:
        return f"N={call.A.shape[1]}: at most {TPU_MOST_STATES} states a channel are served"
    return None


def forward(call: Inputs, softplus: bool, keep: bool = False, *, interpret: bool) -> tuple[Array, ...]:
    """y [B, T, D] in x's dtype and the final state [B, D, N] in float32.

    With `keep` also the states before every KEPT tokens [B, T / KEPT, N, D], in float32.
    """
    launch = _Launch(call, softplus, interpret, time=KEPT if keep else 512)
    launch.read("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "keep")
    launch.write("y", launch.padded(call.x.shape, call.x.dtype), launch.block)
    launch.write("final_state", launch.state_shape, launch.state_block)
    if keep:
        launch.write("states", launch.states_shape, launch.states_block)
    scratch = {"state": launch.scratch_state, **launch.tiles(2), **launch.sums(1)}
    got = launch.run("selective_scan_forward", forward_kernel, scratch)
    results = launch.trim(got["y"]), launch.trim_state(got["final_state"])
    N, D = call.A.T.shape
    return (*results, got["states"][:, :, :N, :D]) if keep else results


def backward(
    call: Inputs, states: Array, cotangents: tuple[Array, Array], softplus: bool, *, interpret: bool
) -> Inputs:
    """The gradient of each input, in its shape and dtype; None where the input is None."""
    batch, T, D = call.x.shape
    N = call.A.shape[1]
    launch = _Launch(call, softplus, interpret, time=KEPT, backwards=True)
    launch.read("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "keep")
    launch.add("dy", launch.pad(cotangents[0].astype(call.x.dtype)), launch.block)
    launch.add("d_final", launch.pad_state(cotangents[1]), launch.state_block)
    launch.add("states", launch.fit(states, launch.states_shape.shape), launch.states_block)
    for name in ("x", "dt", "z"):
        if name in launch.arrays:
            launch.write(f"d{name}", launch.arrays[name], launch.block)
    channel_blocks = launch.grid[1]
    columns = jax.ShapeDtypeStruct((batch, channel_blocks, *launch.arrays["B"].shape[1:]), F32)
    for name, block in (("B", columns), ("C", columns)):
        launch.write(f"d{name}", block, launch.columns_by_channels)
    rows = jax.ShapeDtypeStruct((batch, SUBLANES, launch.shape[2]), F32)
    for name in ("D", "dt_bias"):
        launch.write(f"d{name}", rows, launch.rows_block)
    for name in ("A", "initial_state"):
        launch.write(f"d{name}", launch.state_shape, launch.state_block)
    time = launch.tiling.time
    per_token = pltpu.VMEM((time + 1, launch.tiling.states, launch.tiling.channels), F32)
    scratch = {
        "before": per_token,
        "carry": launch.scratch_state,
        **{name: pltpu.VMEM((time, launch.tiling.channels), F32) for name in ("step", "dout")},
        **launch.tiles(3),
        **launch.sums(2),
    }
    got = launch.run("selective_scan_backward", backward_kernel, scratch)

    d_columns = {n: jnp.swapaxes(got[f"d{n}"].sum(1)[:, :N, :T], 1, 2) for n in ("B", "C")}
    return Inputs(
        x=launch.trim(got["dx"]),
        dt=launch.trim(got["ddt"]).astype(call.dt.dtype),
        A=got["dA"].sum(0)[:N, :D].T,
        D=got["dD"].sum((0, 1))[:D],
        z=None if call.z is None else launch.trim(got["dz"]),
        dt_bias=got["ddt_bias"].sum((0, 1))[:D],
        initial_state=launch.trim_state(got["dinitial_state"]),
        starts=None,
        **d_columns,
    )


class _Launch:
    """The operands and results of one kernel, padded to whole blocks, by name."""

    def __init__(self, call: Inputs, softplus: bool, interpret: bool, *, time: int, backwards: bool = False):
        self.call, self.softplus, self.interpret = call, softplus, interpret
        batch, T, D = call.x.shape
        self.tiling: TPUTiling = for_tpu(T, D, call.A.shape[1], time=time)
        t, ch, n = self.tiling.time, self.tiling.channels, self.tiling.states
        self.shape = (batch, round_up(T, t), round_up(D, ch))
        blocks = self.shape[1] // t
        gated, packed = call.z is not None, call.starts is not None
        self.plan = Plan(self.tiling, blocks, softplus, gated, packed, interpret)
        self.grid = (batch, self.shape[2] // ch, blocks)
        at = (lambda i: blocks - 1 - i) if backwards else (lambda i: i)
        lanes = round_up(t, LANES)
        self.lanes = blocks * lanes
        self.block = pl.BlockSpec((None, t, ch), lambda b, d, i: (b, at(i), d))
        self.columns = pl.BlockSpec((None, n, lanes), lambda b, d, i: (b, 0, at(i)))
        self.keep_columns = pl.BlockSpec((None, SUBLANES, lanes), lambda b, d, i: (b, 0, at(i)))
        self.columns_by_channels = pl.BlockSpec((None, None, n, lanes), lambda b, d, i: (b, d, 0, at(i)))
        self.row = pl.BlockSpec((1, ch), lambda b, d, i: (0, d))
        self.rates = pl.BlockSpec((n, ch), lambda b, d, i: (0, d))
        self.rows_block = pl.BlockSpec((None, SUBLANES, ch), lambda b, d, i: (b, 0, d))
        self.state_block = pl.BlockSpec((None, n, ch), lambda b, d, i: (b, 0, d))
        self.states_block = pl.BlockSpec((None, None, n, ch), lambda b, d, i: (b, at(i), 0, d))
        self.state_shape = jax.ShapeDtypeStruct((batch, n, self.shape[2]), F32)
        self.states_shape = jax.ShapeDtypeStruct((batch, blocks, n, self.shape[2]), F32)
        self.scratch_state = pltpu.VMEM((n, ch), F32)
        self.arrays, self.specs = {}, {}
        self.results, self.result_specs = {}, {}

    def tiles(self, count: int) -> dict:
        """Scratch for a tile of tokens, named tile0, tile1, ..."""
        shape = (self.tiling.rows, self.tiling.channels)
        return {f"tile{i}": pltpu.VMEM(shape, F32) for i in range(count)}

    def sums(self, count: int) -> dict:
        """Scratch for `OverStates`, named sums0, sums1, ..."""
        shape = (self.tiling.tiles, self.tiling.rows * SUBLANES, LANES)
        return {f"sums{i}": pltpu.VMEM(shape, F32) for i in range(count)}

    def add(self, name: str, array: Array, spec: pl.BlockSpec) -> None:
        self.arrays[name], self.specs[name] = array, spec

    def write(self, name: str, like, spec: pl.BlockSpec) -> None:
        self.results[name] = jax.ShapeDtypeStruct(like.shape, like.dtype)
        self.result_specs[name] = spec

    def read(self, *names: str) -> None:
        call = self.call
        for name in names:
            if name == "dt":  # without a softplus there is nothing to fuse
                dt = self.pad(call.dt, NO_STEP) if self.softplus else self.pad(step_size(call, False))
                self.add(name, dt, self.block)
            elif name in ("B", "C"):
                self.add(name, self.pad_columns(getattr(call, name), self.tiling.states), self.columns)
            elif name in ("D", "dt_bias"):
                self.add(name, self.fit(getattr(call, name)[None], (1, self.shape[2])), self.row)
            elif name == "A":
                rates = self.fit(call.A.T * LOG2_E, self.state_shape.shape[1:])
                self.add(name, rates, self.rates)
            elif name == "initial_state":
                self.add(name, self.pad_state(call.initial_state), self.state_block)
            elif name == "keep":
                if call.starts is not None:
                    keep = jnp.repeat(1.0 - call.starts.astype(F32)[..., None], SUBLANES, axis=2)
                    self.add(name, self.pad_columns(keep, SUBLANES, 1.0), self.keep_columns)
            elif getattr(call, name) is not None:
                self.add(name, self.pad(getattr(call, name)), self.block)

    def run(self, name: str, kernel, scratch: dict) -> dict[str, Array]:
        names = [*self.arrays, *self.results, *scratch]
        results = pl.pallas_call(
            lambda *refs: kernel(self.plan, **{f"{n}_ref": r for n, r in zip(names, refs, strict=True)}),
            grid=self.grid,
            in_specs=list(self.specs.values()),
            out_specs=list(self.result_specs.values()),
            out_shape=list(self.results.values()),
            scratch_shapes=list(scratch.values()),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            interpret=self.interpret,
            name=name,
        )(*self.arrays.values())
        return dict(zip(self.results, results, strict=True))

    def padded(self, shape, dtype):
        return jax.ShapeDtypeStruct(self.shape, dtype)

    def pad(self, x: Array, value: float = 0.0) -> Array:
        return self.fit(x, self.shape, value)

    def pad_columns(self, x: Array, rows: int, value: float = 0.0) -> Array:
        return self.fit(jnp.swapaxes(x, 1, 2), (x.shape[0], rows, self.lanes), value)

    def pad_state(self, state: Array) -> Array:
        return self.fit(jnp.swapaxes(state, 1, 2).astype(F32), self.state_shape.shape)

    def trim(self, x: Array) -> Array:
        _, T, D = self.call.x.shape
        return x[:, :T, :D]

    def trim_state(self, state: Array) -> Array:
        D, N = self.call.A.shape
        return jnp.swapaxes(state[:, :N, :D], 1, 2)

    @staticmethod
    def fit(x: Array, shape, value: float = 0.0) -> Array:
        widths = [(0, to - n) for n, to in zip(x.shape, shape, strict=True)]
        return (
            jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype))
            if any(w for _, w in widths)
            else x
        )
