"""Linear attention on TPU: which calls the kernels take, and their arrays around them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..common.arguments import pad_to, trim
from ..common.chips import LANES, SUBLANES, VMEM_LIMIT
from ..common.tiling import round_up
from ..common.tpu import F32, Layout, TimeGrid
from . import pallas_tpu_features as features
from .features import widened
from .inputs import Inputs, feature_count
from .pallas_tpu_backward import backward_kernel
from .pallas_tpu_decay import FLOOR, RESTART
from .pallas_tpu_forward import Spec, forward_kernel, states_kernel
from .tiling import SHORTEST, Tiling, choose, itemsize_fits, vmem_bytes


def unsupported_reason(call: Inputs, feature_map: str | None = None) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if not itemsize_fits(call.q.dtype):
        return f"dtype {call.q.dtype}: bfloat16 and float32 are served"
    wide, shortest = _chunked(call, feature_map)
    tilings = ((choose(wide, backward=b, shortest=shortest), b) for b in (False, True))
    needed = max(vmem_bytes(wide, tiling, backward=b) for tiling, b in tilings)
    if needed > VMEM_LIMIT:
        return (
            f"K={call.q.shape[-1]} and V={call.v.shape[-1]}: states and blocks would take "
            f"{needed >> 20} MiB of VMEM, {VMEM_LIMIT >> 20} are served"
        )
    return None


def forward(
    call: Inputs, scale: float, feature_map: str | None = None, *, interpret: bool
) -> tuple[Array, Array]:
    """(out [B, T, H, V] in v's dtype, final_state [B, H, F, V] in float32)."""
    tiling = _choose(call, feature_map, backward=False, interpret=interpret)
    return forward_tiled(call, scale, tiling, feature_map, interpret=interpret)


def backward(
    call: Inputs,
    cotangents: tuple[Array, Array],
    scale: float,
    feature_map: str | None = None,
    *,
    interpret: bool,
) -> Inputs:
    """The gradient of each input, in its shape and dtype; None where the input is None."""
    tiling = _choose(call, feature_map, backward=True, interpret=interpret)
    return backward_tiled(call, cotangents, scale, tiling, feature_map, interpret=interpret)


def _choose(call: Inputs, feature_map: str | None, *, backward: bool, interpret: bool) -> Tiling:
    wide, shortest = _chunked(call, feature_map)
    return choose(wide, backward=backward, interpret=interpret, shortest=shortest)


def _chunked(call: Inputs, feature_map: str | None) -> tuple[Inputs, int]:
    """The call's shapes as the kernel holds them in VMEM, and the fewest tokens of a chunk."""
    if feature_map is None:
        return call, SHORTEST
    # Narrow rows have time along lanes, of which a chunk is then a whole register or more.
    return jax.eval_shape(partial(widened, feature_map=feature_map), call), LANES


def forward_tiled(
    call: Inputs, scale: float, tiling: Tiling, feature_map: str | None = None, *, interpret: bool
) -> tuple[Array, Array]:
    """`forward` with blocks of one's choice."""
    whole = _Call(call, scale, tiling, feature_map, interpret, "linear_attention_forward")
    whole.read("q", "k", "v", "log_decay", "rows", "bonus", "initial_state")
    out = whole.write("out", call.v.dtype, (*call.v.shape[:2], call.heads, call.v.shape[3]))
    whole.write_state("final_state")
    whole.launch.hold("state", whole.state_shape)
    results = whole.run(forward_kernel)
    return out.restore(results["out"]), whole.trim_state(results["final_state"])


def backward_tiled(
    call: Inputs, cotangents, scale: float, tiling: Tiling, feature_map: str | None = None, *, interpret: bool
) -> Inputs:
    """`backward` with blocks of one's choice."""
    d_out, d_final_state = cotangents
    before = _Call(call, scale, tiling, feature_map, interpret, "linear_attention_states")
    before.read("k", "v", "log_decay", "rows", "initial_state")
    K, V = before.widths
    B, H, n = call.q.shape[0], call.heads, tiling.heads
    before.launch.write("states", (B, H, before.grid.steps, V, K), F32, before.states_spec)
    before.launch.hold("state", before.state_shape)
    states = before.run(states_kernel)["states"]

    after = _Call(call, scale, tiling, feature_map, interpret, "linear_attention_backward", backwards=True)
    after.read("q", "k", "v", "log_decay", "rows", "bonus")
    launch = after.launch
    out = after.layout("out", call.v.dtype, d_out.shape)
    launch.add("d_out", out.arrange(d_out.astype(call.v.dtype)), out.spec)
    launch.add("d_final_state", after.pad_state(d_final_state), after.state_spec)
    launch.add("states", states, after.states_spec)
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        # A gradient a head of the call; those that read the same head are added up after, in float32.
        after.write(f"d{name}", x.dtype if x.shape[2] == H else F32, (*x.shape[:2], H, x.shape[3]))
    channels = call.log_decay is not None and call.log_decay.ndim == 4
    if channels:
        after.write("d_log_decay", call.log_decay.dtype, call.log_decay.shape)
    elif call.log_decay is not None:
        spec = pl.BlockSpec((1, 1, SUBLANES, tiling.block), lambda b, h, t: (b, h, 0, after.grid.at(t)))
        launch.write("d_rows", (B, H // n, SUBLANES, after.grid.padded), F32, spec)
    if call.bonus is not None:
        spec = pl.BlockSpec((1, 1, n, K), lambda b, h, t: (b, h, 0, 0))
        launch.write("d_bonus", (B, H // n, n, K), F32, spec)
    after.write_state("d_initial_state")
    launch.hold("d_state", after.state_shape)
    launch.hold("chunk_states", (tiling.block // tiling.chunk, *after.state_shape))
    grads = after.run(backward_kernel)

    restored = {}
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        grad = after.layouts[f"d{name}"].restore(grads[f"d{name}"])
        if x.shape[2] != H:
            grad = grad.reshape(*x.shape[:3], H // x.shape[2], x.shape[3]).sum(3)
        restored[name] = grad.astype(x.dtype)
    d_log_decay = None
    if channels:
        d_log_decay = after.layouts["d_log_decay"].restore(grads["d_log_decay"])
    elif call.log_decay is not None:
        d_log_decay = grads["d_rows"][:, :, :n].reshape(B, H, -1)[:, :, : call.q.shape[1]].swapaxes(1, 2)
    if d_log_decay is not None:
        if call.runs is not None:  # nothing passes a restart, whatever its decay
            starts = _starts(call.runs)
            d_log_decay = jnp.where(
                starts[..., None, None] if channels else starts[..., None], 0, d_log_decay
            )
        if call.log_decay.ndim == 1:
            d_log_decay = d_log_decay.sum((0, 1))
        d_log_decay = d_log_decay.astype(call.log_decay.dtype)
    d_bonus = d_initial = None
    if call.bonus is not None:
        d_bonus = grads["d_bonus"].reshape(B, H, K)[:, :, : call.q.shape[3]].sum(0).astype(call.bonus.dtype)
    if call.initial_state is not None:
        d_initial = after.trim_state(grads["d_initial_state"]).astype(call.initial_state.dtype)
    return Inputs(**restored, log_decay=d_log_decay, bonus=d_bonus, initial_state=d_initial, runs=None)


def _starts(runs: Array) -> Array:
    """[B, T]: whether a document starts there, other than at the first token."""
    return jnp.pad(runs[:, 1:] != runs[:, :-1], ((0, 0), (1, 0)))


class _Call:
    """A call's arrays on their way to one kernel."""

    def __init__(
        self,
        call: Inputs,
        scale: float,
        tiling: Tiling,
        feature_map: str | None,
        interpret: bool,
        name: str,
        *,
        backwards: bool = False,
    ):
        self.call, self.tiling, self.interpret, self.scale = call, tiling, interpret, scale
        B, T, n = call.q.shape[0], call.q.shape[1], tiling.heads
        self.grid = TimeGrid((B, call.heads // n), T, tiling.block, backwards)
        self.launch = self.grid.launch(name, interpret=interpret, vmem_limit=VMEM_LIMIT)
        self.narrow = feature_map is not None
        self.state_sizes = feature_count(call.q.shape[3], feature_map), call.v.shape[3]
        self.widths = tuple(round_up(size, LANES) for size in self.state_sizes)
        if self.narrow:
            features.add_constants(self.launch, call.q.shape[3], call.q.dtype)
        K, V = self.widths
        self.state_shape = (n, V, K)
        self.state_spec = pl.BlockSpec((1, n, K, V), lambda b, h, t: (b, h, 0, 0))
        at = self.grid.at
        self.states_spec = pl.BlockSpec((1, n, 1, V, K), lambda b, h, t: (b, h, at(t), 0, 0))
        self.layouts: dict[str, Layout] = {}

    def layout(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Layout:
        heads, n, chunk = self.call.heads, self.tiling.heads, self.tiling.chunk
        kind = features.NarrowLayout if self.narrow and name.lstrip("d") in features.NARROW else Layout
        self.layouts[name] = kind(shape, jnp.dtype(dtype), heads, n, self.grid, chunk, self.interpret)
        return self.layouts[name]

    def write(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Layout:
        """Have the kernel write [B, T, heads, D]."""
        layout = self.layout(name, dtype, shape)
        self.launch.write(name, layout.arranged, dtype, layout.spec)
        return layout

    def write_state(self, name: str) -> None:
        shape = (self.call.q.shape[0], self.call.heads, *self.widths)
        self.launch.write(name, shape, F32, self.state_spec)

    def pad_state(self, x: Array) -> Array:
        return pad_to(x.astype(F32), (*x.shape[:2], *self.widths))

    def trim_state(self, x: Array) -> Array:
        return trim(x, (*x.shape[:2], *self.state_sizes))

    def read(self, *names: str) -> None:
        """Add inputs of the call, where it has them."""
        for name in names:
            self._read(name, self._rows() if name == "rows" else getattr(self.call, name))

    def _read(self, name: str, x: Array | None) -> None:
        n, K, at = self.tiling.heads, self.widths[0], self.grid.at
        if x is None:
            return
        if name == "rows":
            many, groups = int(x.shape[0] > 1), int(x.shape[1] > 1)
            block = (1, 1, SUBLANES, self.tiling.block)
            self.launch.add(name, x, pl.BlockSpec(block, lambda b, h, t: (b * many, h * groups, 0, at(t))))
        elif name == "initial_state":
            self.launch.add(name, self.pad_state(x), self.state_spec)
        elif name == "bonus":
            x = pad_to(x.astype(F32), (x.shape[0], K)).reshape(-1, n, K)
            self.launch.add(name, x, pl.BlockSpec((1, n, K), lambda b, h, t: (h, 0, 0)))
        elif name != "log_decay" or x.ndim == 4:
            layout = self.layout(name, x.dtype, x.shape)
            self.launch.add(name, layout.arrange(x), layout.spec)

    def _rows(self) -> Array | None:
        """Log decays of heads that have one each, [B or 1, H / heads or 1, 8, T'].

        RESTART where a document starts. With a decay a channel, only zero where one starts, else one. None if
        there is nothing to say.
        """
        call, n = self.call, self.tiling.heads
        decay, starts = call.log_decay, None if call.runs is None else _starts(call.runs)[:, None]
        T = call.q.shape[1]
        if decay is not None and decay.ndim == 4:
            if starts is None:
                return None
            rows = jnp.where(starts, 0.0, 1.0)
        elif decay is None:
            if starts is None:
                return None
            rows = jnp.where(starts, RESTART, 0.0)
        else:
            decay = jnp.maximum(decay.astype(jnp.float32), FLOOR)
            rows = decay[None, :, None] if decay.ndim == 1 else decay.swapaxes(1, 2)
            if starts is not None:
                rows = jnp.where(starts, RESTART, rows)
        rows = jnp.broadcast_to(rows, (*rows.shape[:2], T))
        if rows.shape[1] == 1:
            rows = jnp.broadcast_to(rows[:, :, None], (rows.shape[0], 1, SUBLANES, T))
        else:
            rows = rows.reshape(rows.shape[0], -1, n, T)
        after = self.grid.padded - T
        nothing = 1.0 if decay is not None and decay.ndim == 4 else 0.0
        tail = ((0, 0), (0, 0), (0, SUBLANES - rows.shape[2]), (0, after))
        return jnp.pad(rows, tail, constant_values=nothing)

    def run(self, kernel: Callable[[Spec, dict], None]) -> dict[str, Array]:
        """Each result by its name; the kernel gets its refs by name, in a dictionary."""
        spec = Spec(self.tiling, self.grid, self.layouts, self.scale)
        if "rows" in self.launch.operands and not spec.channels:
            chunks, C = self.tiling.block // self.tiling.chunk, self.tiling.chunk
            parts = (3 if self.call.k.dtype == F32 else 2) * SUBLANES
            self.launch.hold("decay_rows", (chunks, parts, C))
            self.launch.hold("decay_columns", (chunks, C, parts))
        return self.launch.run(
            lambda **refs: kernel(spec, {name.removesuffix("_ref"): ref for name, ref in refs.items()})
        )
