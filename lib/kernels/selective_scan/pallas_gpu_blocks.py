"""The parts that the GPU kernels share: tiles come and go by TMA while a thread walks down its channel."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.chips import WARPGROUP
from ..common.hopper import F32, Pipeline

CHANNELS = WARPGROUP  # one a thread
SLOTS = 2
TILED = ("x", "dt", "z", "dy", "y", "dx", "ddt", "dz")  # [B, T, D]
ROWS = ("A", "state", "d_final", "final", "dA", "dstate")  # [N, D], or one a sequence
PER_STEP = ("states",)  # [B, steps, N, D]
VECTORS = ("D", "dt_bias", "dD", "ddt_bias")  # [D], or one a sequence
SUMS = ("dB", "dC")  # [B, blocks of channels, T * N]


@dataclasses.dataclass(frozen=True)
class Spec:
    """A kernel's static description."""

    shape: tuple[int, int, int]  # B, T, D in whole tiles
    states: int
    tokens: int  # a tile
    softplus: bool
    gated: bool
    packed: bool
    interpret: bool  # on CPU, which knows no layouts

    @property
    def steps(self) -> int:
        return self.shape[1] // self.tokens


class Program:
    """One program's view of its operands and results, by name, and of their tiles in shared memory."""

    def __init__(self, spec: Spec, refs: dict, scratch: dict, inputs: tuple, outputs: tuple):
        self.spec, self.refs, self.smem = spec, refs, scratch
        self.fetched = [n for n in inputs if n in TILED or n in PER_STEP or n == "columns"]
        self.stored = [n for n in outputs if n in TILED or n in PER_STEP or n in SUMS]
        self.batch = lax.axis_index("b")
        self.block = lax.axis_index("d")
        self.channels = pl.ds(self.block * CHANNELS, CHANNELS)

    @staticmethod
    def scratch(spec: Spec, arrays: dict, results: dict) -> dict:
        """Shared memory for each operand and result, and barriers."""
        t, n = spec.tokens, spec.states
        types, fetched = {}, 0
        for name, array in (arrays | results).items():
            if name in TILED:
                shape = (SLOTS, t, CHANNELS)
            elif name in PER_STEP:
                shape = (SLOTS, n, CHANNELS)
            elif name in SUMS:
                shape = (SLOTS, t * n)
            elif name == "columns":
                shape = (SLOTS, t, array.shape[2])
            else:  # read before the walk or written after it
                continue
            types[name] = plgpu.SMEM(shape, array.dtype)
            fetched += name in arrays
        types |= {"rows": plgpu.SMEM((n, CHANNELS), F32), "vector": plgpu.SMEM((CHANNELS,), F32)}
        if "dy" in arrays:
            types |= {name: plgpu.SMEM((t * n, CHANNELS), F32) for name in ("before", "products")}
        types |= {"arrived": plgpu.Barrier(num_arrivals=fetched, num_barriers=SLOTS), "one": plgpu.Barrier()}
        return types

    def place(self, name: str, step):
        """The place of a tile in global memory."""
        tokens, ref = self.spec.tokens, self.refs[name]
        if name in TILED:
            return ref.at[self.batch, pl.ds(step * tokens, tokens), self.channels]
        if name in PER_STEP:
            return ref.at[self.batch, step, :, self.channels]
        if name in SUMS:
            size = tokens * self.spec.states
            return ref.at[self.batch, self.block, pl.ds(step * size, size)]
        return ref.at[self.batch, pl.ds(step * tokens, tokens)]

    def each_step(self, visit, carry, *, backwards: bool = False):
        """Thread `carry = visit(step, slot, carry)` through the tiles; the next one travels meanwhile."""
        pipeline = Pipeline(self.spec.steps, SLOTS, ahead=SLOTS, backwards=backwards)
        arrived = self.smem["arrived"]

        def fetch(tile, slot):
            for name in self.fetched:
                plgpu.copy_gmem_to_smem(self.place(name, tile), self.smem[name].at[slot], arrived.at[slot])

        def store(tile, slot):
            for name in self.stored:
                plgpu.copy_smem_to_gmem(self.smem[name].at[slot], self.place(name, tile))

        def one(step, slot, carry):
            return visit(pipeline.at(step), slot, carry)

        pipeline.start(fetch)
        carry = pipeline.walk(fetch, one, store, carry, arrived=arrived, stores=len(self.stored))
        plgpu.wait_smem_to_gmem(0)
        return carry

    def rows(self, name: str) -> tuple[Array, ...]:
        """N rows of a [N, D] operand, one value each a thread."""
        ref = self.refs[name]
        source = ref.at[:, self.channels] if name == "A" else ref.at[self.batch, :, self.channels]
        self._read(source, self.smem["rows"])
        values = tuple(self.smem["rows"][n] for n in range(self.spec.states))
        plgpu.commit_smem()  # every thread has read: the next operand may come
        return values

    def row(self, name: str) -> Array:
        self._read(self.refs[name].at[self.channels], self.smem["vector"])
        value = self.smem["vector"][...]
        plgpu.commit_smem()
        return value

    def _read(self, source, to) -> None:
        plgpu.copy_gmem_to_smem(source, to, self.smem["one"])
        plgpu.barrier_wait(self.smem["one"])

    def write_rows(self, name: str, values) -> None:
        for n, value in enumerate(values):
            self.smem["rows"][n] = value
        self._write(self.smem["rows"], self.refs[name].at[self.batch, :, self.channels])

    def write_row(self, name: str, value) -> None:
        self.smem["vector"][...] = value
        self._write(self.smem["vector"], self.refs[name].at[self.batch, self.channels])

    @staticmethod
    def _write(source, to) -> None:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(source, to)
        plgpu.wait_smem_to_gmem(0)

    def tile(self, name: str, slot, r: int) -> Array:
        return self.smem[name][slot, r].astype(F32)

    def put(self, name: str, slot, r: int, value: Array) -> None:
        self.smem[name][slot, r] = value.astype(self.smem[name].dtype)

    def put_rows(self, name: str, slot, values) -> None:
        for n, value in enumerate(values):
            self.smem[name][slot, n] = value

    def column(self, slot, r: int, n: int) -> Array:
        """A scalar of token r: B's states, then C's."""
        return self.smem["columns"][slot, r, n]

    def keep(self, slot, r: int) -> Array | None:
        return self.column(slot, r, 2 * self.spec.states) if self.spec.packed else None

    @staticmethod
    def fresh(h: Array, keep: Array | None) -> Array:
        """The state, or zeros, whatever it holds, where a document starts."""
        return h if keep is None else jnp.where(keep > 0.5, h, 0.0)


def step_sizes(spec: Spec, raw: Array) -> Array:
    """dt, from what came in with its bias added."""
    if not spec.softplus:
        return raw
    u = jnp.exp(-jnp.abs(raw))  # log(1 + u), exact where 1 + u rounds: Kahan's way
    one = 1.0 + u
    log1p = jnp.where(one == 1.0, u, jnp.log(one) * u / jnp.where(one == 1.0, 1.0, one - 1.0))
    return jnp.maximum(raw, 0.0) + log1p
