"""Linear attention on TPU: which calls the kernels take, and their arrays around them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .inputs import Inputs
from .pallas_tpu_backward import backward_kernel
from .pallas_tpu_blocks import Cut
from .pallas_tpu_decay import FLOOR, RESTART, SUBLANES
from .pallas_tpu_forward import Plan, forward_kernel, states_kernel
from .tiling import LANES, VMEM_LIMIT, Tiling, choose, itemsize_fits, round_up, vmem_bytes


def unsupported_reason(call: Inputs) -> str | None:
    """Why this kernel can't serve the call; None if it can. Works on shapes and dtypes alone."""
    if not itemsize_fits(call.q.dtype):
        return f"dtype {call.q.dtype}: bfloat16 and float32 are served"
    needed = max(vmem_bytes(call, choose(call, backward=b), backward=b) for b in (False, True))
    if needed > VMEM_LIMIT:
        return (
            f"K={call.q.shape[-1]} and V={call.v.shape[-1]}: states and blocks would take "
            f"{needed >> 20} MiB of VMEM, {VMEM_LIMIT >> 20} are served"
        )
    return None


def forward(call: Inputs, scale: float, *, interpret: bool) -> tuple[Array, Array]:
    """(out [B, T, H, V] in v's dtype, final_state [B, H, K, V] in float32)."""
    return forward_tiled(call, scale, choose(call, backward=False, interpret=interpret), interpret=interpret)


def backward(call: Inputs, cotangents: tuple[Array, Array], scale: float, *, interpret: bool) -> Inputs:
    """The gradient of each input, in its shape and dtype; None where the input is None."""
    return backward_tiled(
        call, cotangents, scale, choose(call, backward=True, interpret=interpret), interpret=interpret
    )


def forward_tiled(call: Inputs, scale: float, tiling: Tiling, *, interpret: bool) -> tuple[Array, Array]:
    """`forward` with blocks of one's choice."""
    launch = _Launch(call, scale, tiling, interpret)
    for name in ("q", "k", "v", "log_decay", "rows", "bonus", "initial_state"):
        launch.read(name)
    out = launch.cut("out", call.v.dtype, (*call.v.shape[:2], call.heads, call.v.shape[3]))
    launch.write("out", out.arranged, out.spec(launch.time))
    launch.write_state("final_state")
    results = launch.run("linear_attention_forward", forward_kernel, {"state": launch.state_shape})
    return out.restore(results["out"]), launch.trim_state(results["final_state"])


def backward_tiled(call: Inputs, cotangents, scale: float, tiling: Tiling, *, interpret: bool) -> Inputs:
    """`backward` with blocks of one's choice."""
    d_out, d_final_state = cotangents
    before = _Launch(call, scale, tiling, interpret)
    for name in ("k", "v", "log_decay", "rows", "initial_state"):
        before.read(name)
    K, V = before.widths
    B, H = call.q.shape[0], call.heads
    states = jax.ShapeDtypeStruct((B, H, before.steps, V, K), jnp.float32)
    states_block = (1, tiling.heads, 1, V, K)
    before.write("states", states, pl.BlockSpec(states_block, lambda b, h, t: (b, h, t, 0, 0)))
    scratch = {"state": before.state_shape}
    states = before.run("linear_attention_states", states_kernel, scratch)["states"]

    after = _Launch(call, scale, tiling, interpret, reverse=True)
    for name in ("q", "k", "v", "log_decay", "rows", "bonus"):
        after.read(name)
    out = after.cut("out", call.v.dtype, d_out.shape)
    after.add("d_out", out.arrange(d_out.astype(call.v.dtype)), out.spec(after.time))
    after.add("d_final_state", after.pad_state(d_final_state), after.state_spec)
    after.add("states", states, pl.BlockSpec(states_block, lambda b, h, t: (b, h, after.time(t), 0, 0)))
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        # A gradient a head of the call; those that read the same head are added up after, in float32.
        dtype = x.dtype if x.shape[2] == H else jnp.float32
        cut = after.cut(f"d{name}", dtype, (*x.shape[:2], H, x.shape[3]))
        after.write(f"d{name}", cut.arranged, cut.spec(after.time))
    channels = call.log_decay is not None and call.log_decay.ndim == 4
    if channels:
        cut = after.cut("d_log_decay", call.log_decay.dtype, call.log_decay.shape)
        after.write("d_log_decay", cut.arranged, cut.spec(after.time))
    elif call.log_decay is not None:
        groups, n = H // tiling.heads, tiling.heads
        rows = jax.ShapeDtypeStruct((B, groups, SUBLANES, before.steps * tiling.block), jnp.float32)
        spec = pl.BlockSpec((1, 1, SUBLANES, tiling.block), lambda b, h, t: (b, h, 0, after.time(t)))
        after.write("d_rows", rows, spec)
    if call.bonus is not None:
        bonus = jax.ShapeDtypeStruct((B, H // tiling.heads, tiling.heads, K), jnp.float32)
        after.write("d_bonus", bonus, pl.BlockSpec((1, 1, tiling.heads, K), lambda b, h, t: (b, h, 0, 0)))
    after.write_state("d_initial_state")
    scratch = {
        "d_state": after.state_shape,
        "chunk_states": (tiling.block // tiling.chunk, *after.state_shape),
    }
    grads = after.run("linear_attention_backward", backward_kernel, scratch)

    restored = {}
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        grad = after.cuts[f"d{name}"].restore(grads[f"d{name}"])
        if x.shape[2] != H:
            grad = grad.reshape(*x.shape[:3], H // x.shape[2], x.shape[3]).sum(3)
        restored[name] = grad.astype(x.dtype)
    d_log_decay = None
    if channels:
        d_log_decay = after.cuts["d_log_decay"].restore(grads["d_log_decay"])
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


class _Launch:
    """One kernel launch being put together: its operands, its results, and their blocks."""

    def __init__(self, call: Inputs, scale: float, tiling: Tiling, interpret: bool, reverse: bool = False):
        self.call, self.tiling, self.interpret, self.scale = call, tiling, interpret, scale
        self.steps = -(-call.q.shape[1] // tiling.block)
        last = self.steps - 1
        self.time = (lambda t: last - t) if reverse else (lambda t: t)
        self.widths = tuple(round_up(x.shape[3], LANES) for x in (call.q, call.v))
        K, V = self.widths
        self.state_shape = (tiling.heads, V, K)
        self.state_spec = pl.BlockSpec((1, tiling.heads, K, V), lambda b, h, t: (b, h, 0, 0))
        self.cuts: dict[str, Cut] = {}
        self.operands: dict[str, tuple[Array, pl.BlockSpec]] = {}
        self.results: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {}

    def cut(self, name: str, dtype, shape) -> Cut:
        self.cuts[name] = Cut(tuple(shape), jnp.dtype(dtype), self.call.heads, self.tiling, self.interpret)
        return self.cuts[name]

    def add(self, name: str, x: Array, spec: pl.BlockSpec) -> None:
        self.operands[name] = x, spec

    def write(self, name: str, shape: jax.ShapeDtypeStruct, spec: pl.BlockSpec) -> None:
        self.results[name] = shape, spec

    def write_state(self, name: str) -> None:
        K, V = self.widths
        shape = (self.call.q.shape[0], self.call.heads, K, V)
        self.write(name, jax.ShapeDtypeStruct(shape, jnp.float32), self.state_spec)

    def pad_state(self, x: Array) -> Array:
        K, V = self.widths
        return jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, K - x.shape[2]), (0, V - x.shape[3])))

    def trim_state(self, x: Array) -> Array:
        return x[:, :, : self.call.q.shape[3], : self.call.v.shape[3]]

    def read(self, name: str) -> None:
        """Add an input of the call, where it has it."""
        n = self.tiling.heads
        if name == "rows":
            rows = self._rows()
            if rows is not None:
                many, groups = rows.shape[0] > 1, rows.shape[1] > 1
                block = (1, 1, SUBLANES, self.tiling.block)
                self.add(
                    name,
                    rows,
                    pl.BlockSpec(block, lambda b, h, t: (b * many, h * groups, 0, self.time(t))),
                )
            return
        x = getattr(self.call, name)
        if x is None:
            return
        if name == "initial_state":
            self.add(name, self.pad_state(x), self.state_spec)
        elif name == "bonus":
            x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, self.widths[0] - x.shape[1])))
            x = x.reshape(-1, n, self.widths[0])
            self.add(name, x, pl.BlockSpec((1, n, self.widths[0]), lambda b, h, t: (h, 0, 0)))
        elif name != "log_decay" or x.ndim == 4:
            cut = self.cut(name, x.dtype, x.shape)
            self.add(name, cut.arrange(x), cut.spec(self.time))

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
        after = self.steps * self.tiling.block - T
        nothing = 1.0 if decay is not None and decay.ndim == 4 else 0.0
        tail = ((0, 0), (0, 0), (0, SUBLANES - rows.shape[2]), (0, after))
        return jnp.pad(rows, tail, constant_values=nothing)

    def run(self, name: str, body: Callable, scratch: dict[str, tuple[int, ...]]) -> dict[str, Array]:
        plan = Plan(self.tiling, self.cuts, self.scale)
        if "rows" in self.operands and not plan.channels:
            chunks, C = self.tiling.block // self.tiling.chunk, self.tiling.chunk
            parts = (3 if self.call.k.dtype == jnp.float32 else 2) * SUBLANES
            scratch = {**scratch, "decay_rows": (chunks, parts, C), "decay_columns": (chunks, C, parts)}
        names = [*self.operands, *self.results, *scratch]
        out = pl.pallas_call(
            lambda *refs: body(plan, dict(zip(names, refs, strict=True))),
            grid=(self.call.q.shape[0], self.call.heads // self.tiling.heads, self.steps),
            in_specs=[spec for _, spec in self.operands.values()],
            out_specs=[spec for _, spec in self.results.values()],
            out_shape=[shape for shape, _ in self.results.values()],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            interpret=self.interpret,
            name=name,
        )(*(x for x, _ in self.operands.values()))
        return dict(zip(self.results, out, strict=True))
