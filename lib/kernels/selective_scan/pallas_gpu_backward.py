"""The GPU kernel of the gradient: a tile's states computed anew, then walked back over.

dB and dC are sums over channels, which lie in different threads. Each thread leaves its products in shared
memory, a row of 128 for each token and state; warps then read whole rows and add them up.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .pallas_gpu_blocks import CHANNELS, Program, Spec, step_sizes

LN_2 = float(np.log(2))
# Four rows at a time, one a warp; a lane has four neighbouring channels of it.
ROW_A_WARP = plgpu.Layout.TILED(
    plgpu.Tiling(((4, CHANNELS), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def backward_body(spec: Spec, program: Program):
    """The gradient of every operand; `before`: the states that each token of a tile read."""
    A, dh = program.rows("A"), program.rows("d_final")
    bias, D = program.row("dt_bias"), program.row("D")
    N = spec.states
    before, products = program.smem["before"], program.smem["products"]

    def step(i, slot, carry):
        dh, dA, dD, dbias = carry
        h = [program.smem["states"][slot, n] for n in range(N)]
        tokens = []
        for r in range(spec.tokens):
            x, dy = program.tile("x", slot, r), program.tile("dy", slot, r)
            raw = program.tile("dt", slot, r) + bias
            dt, keep = step_sizes(spec, raw), program.keep(slot, r)
            if spec.gated:
                z = program.tile("z", slot, r)
                gate = jax.nn.sigmoid(z)
                slope, d_out, dy = gate * (1.0 + z * (1.0 - gate)), dy, dy * z * gate
                y = D * x
            source = dt * x
            for n in range(N):
                h[n] = program.fresh(h[n], keep)
                before[r * N + n] = h[n]
                h[n] = jnp.exp2(dt * A[n]) * h[n] + source * program.column(slot, r, n)
                products[r * N + n] = h[n] * dy
                if spec.gated:
                    y += h[n] * program.column(slot, r, N + n)
            if spec.gated:
                program.put("dz", slot, r, d_out * y * slope)
            tokens.append((x, dy, raw, dt, keep))
        for r in range(spec.tokens - 1, -1, -1):
            x, dy, raw, dt, keep = tokens[r]
            source, dsource, dexponent = dt * x, jnp.zeros_like(x), jnp.zeros_like(x)
            dh, dA = list(dh), list(dA)
            for n in range(N):
                to_state = dh[n] + program.column(slot, r, N + n) * dy
                dsource += to_state * program.column(slot, r, n)
                dh[n] = program.fresh(jnp.exp2(dt * A[n]) * to_state, keep)
                dlog = dh[n] * before[r * N + n]
                before[r * N + n] = to_state * source  # read for the last time: dB's products take its place
                dexponent += dlog * A[n]
                dA[n] += dlog * dt
            program.put("dx", slot, r, dy * D + dsource * dt)
            ddt = LN_2 * dexponent + dsource * x
            if spec.softplus:
                ddt *= jax.nn.sigmoid(raw)
            program.put("ddt", slot, r, ddt)
            dD, dbias = dD + dy * x, dbias + ddt
        plgpu.commit_smem()  # every thread's products are there
        for name, rows in (("dB", before), ("dC", products)):
            for first in range(0, spec.tokens * N, 16):
                these = pl.ds(first, 16)
                value = rows[these, :]
                if not spec.interpret:
                    value = plgpu.layout_cast(value, ROW_A_WARP)
                program.smem[name][slot, these] = jnp.sum(value, axis=1)
        return tuple(dh), tuple(dA), dD, dbias

    zero = 0.0 * bias  # not a constant: a carry must lie in registers as its successors do
    carry = (dh, (zero,) * N, zero, zero)
    dh, dA, dD, dbias = program.each_step(step, carry, backwards=True)
    program.write_rows("dstate", dh)
    program.write_rows("dA", dA)
    program.write_row("dD", dD)
    program.write_row("ddt_bias", dbias)
