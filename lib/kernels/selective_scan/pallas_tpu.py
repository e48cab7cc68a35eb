"""The scan on TPU: channels on lanes, states on sublanes, token after token, states in VMEM between blocks.

A's log is base 2 from here on: exp(dt A) = 2^(dt A2). The gradient visits blocks of time from the last: from
the state before a block, which the forward pass keeps for it, it computes the others anew and walks back over
them.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from ..common.arguments import pad_to, trim
from ..common.chips import LANES, SUBLANES, VMEM_LIMIT
from ..common.tiling import round_up
from ..common.tpu import F32, TimeGrid
from .inputs import KEPT, Inputs, step_size
from .pallas_tpu_backward import backward_kernel
from .pallas_tpu_blocks import Spec
from .pallas_tpu_forward import forward_kernel
from .tiling import TPU_MOST_STATES, for_tpu

LOG2_E = float(np.log2(np.e))
NO_STEP = -1e30  # softplus of it is zero


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
    whole = _Call(call, softplus, interpret, "selective_scan_forward", time=KEPT if keep else 512)
    whole.read("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "keep")
    launch = whole.launch
    launch.write("y", whole.shape, call.x.dtype, whole.block)
    launch.write("final_state", whole.state_shape, F32, whole.state_block)
    if keep:
        launch.write("states", whole.states_shape, F32, whole.states_block)
    whole.hold_state("state")
    whole.hold_tiles("dt_tile", "input_tile")
    whole.hold_sums("sums")
    got = whole.run(forward_kernel)
    results = trim(got["y"], call.x.shape), whole.trim_state(got["final_state"])
    N, D = call.A.T.shape
    return (*results, got["states"][:, :, :N, :D]) if keep else results


def backward(
    call: Inputs, states: Array, cotangents: tuple[Array, Array], softplus: bool, *, interpret: bool
) -> Inputs:
    """The gradient of each input, in its shape and dtype; None where the input is None."""
    batch, T, D = call.x.shape
    N = call.A.shape[1]
    whole = _Call(call, softplus, interpret, "selective_scan_backward", time=KEPT, backwards=True)
    whole.read("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "keep")
    launch, tiling = whole.launch, whole.spec.tiling
    launch.add("dy", pad_to(cotangents[0].astype(call.x.dtype), whole.shape), whole.block)
    launch.add("d_final", whole.pad_state(cotangents[1]), whole.state_block)
    launch.add("states", pad_to(states, whole.states_shape), whole.states_block)
    for name in ("x", "dt", "z"):
        if name in launch.operands:
            launch.write(f"d{name}", whole.shape, launch.operands[name][0].dtype, whole.block)
    for name in ("B", "C"):
        shape = (batch, launch.grid[1], tiling.states, whole.lanes)
        launch.write(f"d{name}", shape, F32, whole.columns_by_channels)
    for name in ("D", "dt_bias"):
        launch.write(f"d{name}", (batch, SUBLANES, whole.shape[2]), F32, whole.rows_block)
    for name in ("A", "initial_state"):
        launch.write(f"d{name}", whole.state_shape, F32, whole.state_block)
    launch.hold("before", (tiling.time + 1, tiling.states, tiling.channels))
    whole.hold_state("carry")
    for name in ("step", "dout"):
        launch.hold(name, (tiling.time, tiling.channels))
    whole.hold_tiles("dt_tile", "input_tile", "dout_tile")
    whole.hold_sums("sums", "exponent_sums")
    got = whole.run(backward_kernel)

    d_columns = {n: jnp.swapaxes(got[f"d{n}"].sum(1)[:, :N, :T], 1, 2) for n in ("B", "C")}
    return Inputs(
        x=trim(got["dx"], call.x.shape),
        dt=trim(got["ddt"], call.x.shape).astype(call.dt.dtype),
        A=got["dA"].sum(0)[:N, :D].T,
        D=got["dD"].sum((0, 1))[:D],
        z=None if call.z is None else trim(got["dz"], call.x.shape),
        dt_bias=got["ddt_bias"].sum((0, 1))[:D],
        initial_state=whole.trim_state(got["dinitial_state"]),
        starts=None,
        **d_columns,
    )


class _Call:
    """A call's arrays, padded to whole blocks, on their way to one kernel."""

    def __init__(
        self,
        call: Inputs,
        softplus: bool,
        interpret: bool,
        name: str,
        *,
        time: int,
        backwards: bool = False,
    ):
        self.call, self.softplus = call, softplus
        batch, T, D = call.x.shape
        tiling = for_tpu(T, D, call.A.shape[1], time=time)
        t, ch, n = tiling.time, tiling.channels, tiling.states
        channels = round_up(D, ch)
        self.grid = TimeGrid((batch, channels // ch), T, t, backwards)
        self.spec = Spec(tiling, self.grid, softplus, interpret)
        self.launch = self.grid.launch(name, interpret=interpret, vmem_limit=VMEM_LIMIT)
        self.shape = (batch, self.grid.padded, channels)
        at, lanes = self.grid.at, round_up(t, LANES)
        self.lanes = self.grid.steps * lanes
        self.block = pl.BlockSpec((None, t, ch), lambda b, d, i: (b, at(i), d))
        self.columns = pl.BlockSpec((None, n, lanes), lambda b, d, i: (b, 0, at(i)))
        self.keep_columns = pl.BlockSpec((None, SUBLANES, lanes), lambda b, d, i: (b, 0, at(i)))
        self.columns_by_channels = pl.BlockSpec((None, None, n, lanes), lambda b, d, i: (b, d, 0, at(i)))
        self.row = pl.BlockSpec((1, ch), lambda b, d, i: (0, d))
        self.rates = pl.BlockSpec((n, ch), lambda b, d, i: (0, d))
        self.rows_block = pl.BlockSpec((None, SUBLANES, ch), lambda b, d, i: (b, 0, d))
        self.state_block = pl.BlockSpec((None, n, ch), lambda b, d, i: (b, 0, d))
        self.states_block = pl.BlockSpec((None, None, n, ch), lambda b, d, i: (b, at(i), 0, d))
        self.state_shape = (batch, n, channels)
        self.states_shape = (batch, self.grid.steps, n, channels)

    def hold_state(self, name: str) -> None:
        self.launch.hold(name, (self.spec.tiling.states, self.spec.tiling.channels))

    def hold_tiles(self, *names: str) -> None:
        """Name scratch for tiles of tokens."""
        for name in names:
            self.launch.hold(name, (self.spec.tiling.rows, self.spec.tiling.channels))

    def hold_sums(self, *names: str) -> None:
        """Name scratch for `OverStates`."""
        tiling = self.spec.tiling
        for name in names:
            self.launch.hold(name, (tiling.tiles, tiling.rows * SUBLANES, LANES))

    def run(self, kernel: Callable[..., None]) -> dict[str, Array]:
        return self.launch.run(partial(kernel, self.spec))

    def read(self, *names: str) -> None:
        call = self.call
        for name in names:
            if name == "dt":  # without a softplus there is nothing to fuse
                dt = (
                    pad_to(call.dt, self.shape, NO_STEP)
                    if self.softplus
                    else pad_to(step_size(call, False), self.shape)
                )
                self.launch.add(name, dt, self.block)
            elif name in ("B", "C"):
                self.launch.add(
                    name, self.pad_columns(getattr(call, name), self.spec.tiling.states), self.columns
                )
            elif name in ("D", "dt_bias"):
                self.launch.add(name, pad_to(getattr(call, name)[None], (1, self.shape[2])), self.row)
            elif name == "A":
                rates = pad_to(call.A.T * LOG2_E, self.state_shape[1:])
                self.launch.add(name, rates, self.rates)
            elif name == "initial_state":
                self.launch.add(name, self.pad_state(call.initial_state), self.state_block)
            elif name == "keep":
                if call.starts is not None:
                    keep = jnp.repeat(1.0 - call.starts.astype(F32)[..., None], SUBLANES, axis=2)
                    self.launch.add(name, self.pad_columns(keep, SUBLANES, 1.0), self.keep_columns)
            elif getattr(call, name) is not None:
                self.launch.add(name, pad_to(getattr(call, name), self.shape), self.block)

    def pad_columns(self, x: Array, rows: int, value: float = 0.0) -> Array:
        return pad_to(jnp.swapaxes(x, 1, 2), (x.shape[0], rows, self.lanes), value)

    def pad_state(self, state: Array) -> Array:
        return pad_to(jnp.swapaxes(state, 1, 2).astype(F32), self.state_shape)

    def trim_state(self, state: Array) -> Array:
        return trim(jnp.swapaxes(state, 1, 2), self.call.initial_state.shape)
