"""The portable form, which CPU gets: a scan with one product a step, and gradients with one product a matrix.

What a step adds to the gradient of R is an outer product. They are not added up step by step: once the walk
back has every pre-activation's gradient, one product over all tokens gives that of R (FlashRNN's way), as one
product over all tokens gives the pre-activations again, of which nothing was kept. This follows from one
rule: a tangent's R enters through what it adds to W x, so that the tangent's own scan has R for a constant.
JAX finds the rest, forward and reverse, of any order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from .cells import Cell
from .inputs import Inputs


def forward(call: Inputs, keep: bool = False) -> tuple[Array, ...]:
    """h [B, T, H, D] in gates' dtype, and the last state [B, S, H, D].

    With `keep` also the states [T, H, R, B, D] that each token's step read, for `backward`; results are then
    not differentiable.
    """
    run = _scan if keep else _run
    h_THBD, state_SHBD, *reads_THRBD = run(call.cell, _time_first(call))
    return _batch_first(h_THBD), jnp.moveaxis(state_SHBD, 2, 0), *reads_THRBD


def backward(call: Inputs, h: Array, reads: Array, cotangents: tuple[Array, Array]) -> Inputs:
    """The gradients, as `Inputs`, from what `forward` returned."""
    walk = _time_first(call)
    tangent = partial(_tangent, call.cell, walk, _time_first_of(h), reads)
    dh, dstate = cotangents
    transposed = jax.linear_transpose(tangent, walk._replace(starts=None))
    (gradient,) = transposed((_time_first_of(dh), jnp.moveaxis(dstate, 0, 2)))
    return _as_given(gradient, call)


def _time_first_of(x: Array) -> Array:
    """[B, T, H, ...] -> [T, H, B, ...]."""
    return jnp.moveaxis(x, 0, 2)


def _batch_first(x: Array) -> Array:
    """[T, H, B, ...] -> [B, T, H, ...]."""
    return jnp.moveaxis(x, 2, 0)


def _flat(x: Array) -> Array:
    """[..., G, D] -> [..., G * D]."""
    return x.reshape(*x.shape[:-2], -1)


def _time_first(call: Inputs) -> Inputs:
    """Time in front, then heads, gates side by side: gates [T, H, B, G * D], recurrent [H, D, G * D].

    bias [H, G * D], initial_state [S, H, B, D], starts [T, B]. Two-dimensional steps are what XLA is fast at.
    """
    return Inputs(
        gates=_flat(_time_first_of(call.gates)),
        recurrent=_flat(jnp.moveaxis(call.recurrent, 1, 2)),
        bias=_flat(call.bias),
        initial_state=jnp.moveaxis(call.initial_state, 0, 2),
        starts=None if call.starts is None else call.starts.T,
    )


def _as_given(walk: Inputs, call: Inputs) -> Inputs:
    """Undo `_time_first`; `call` has the shapes."""
    H, G, D, _ = call.recurrent.shape
    B, T = call.gates.shape[:2]
    return Inputs(
        gates=_batch_first(walk.gates.reshape(T, H, B, G, D)),
        recurrent=jnp.moveaxis(walk.recurrent.reshape(H, D, G, D), 2, 1),
        bias=walk.bias.reshape(H, G, D),
        initial_state=jnp.moveaxis(walk.initial_state, 2, 0),
        starts=None,
    )


def _product(h: Array, recurrent: Array, dtype) -> Array:
    """R h: h [H, ..., D], recurrent [H, D, G * D] -> [H, ..., G * D]."""
    return jnp.einsum(
        "h...i,hio->h...o",
        h.astype(recurrent.dtype),
        recurrent,
        precision="highest",
        preferred_element_type=dtype,
    )


def _fresh(start_B: Array | None, state: Array) -> Array:
    """The state [..., B, D], zeros where a document starts."""
    return state if start_B is None else jnp.where(start_B[:, None], 0, state)


def _split(x: Array, n: int) -> list[Array]:
    """[..., n * D] -> n arrays [..., D]."""
    return jnp.split(x, n, axis=-1)


def _scan(cell: Cell, walk: Inputs) -> tuple[Array, Array, Array]:
    """h [T, H, B, D], the last state [S, H, B, D], and what the steps read [T, H, R, B, D]."""
    dtype = walk.initial_state.dtype
    bias = walk.bias[:, None].astype(dtype)

    def step(state, token):
        x, start_B = token
        state = [_fresh(start_B, s) for s in state]
        r = _product(state[0], walk.recurrent, dtype) + bias
        reads = [state[s] for s in cell.reads]
        state = cell.step(cell.combine(_split(x.astype(dtype), cell.gates), _split(r, cell.gates)), reads)
        return state, (state[0].astype(walk.gates.dtype), reads)

    state, (h_THBD, reads) = jax.lax.scan(step, tuple(walk.initial_state), (walk.gates, walk.starts))
    none = jnp.zeros((*h_THBD.shape[:2], 0, *h_THBD.shape[2:]), dtype)
    return h_THBD, jnp.stack(state), jnp.stack(reads, axis=2) if reads else none


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(cell: Cell, walk: Inputs) -> tuple[Array, Array]:
    return _scan(cell, walk)[:2]


@_run.defjvp
def _run_jvp(cell, primals, tangents):
    (walk,), (dwalk,) = primals, tangents
    h, state, reads = _scan(cell, walk)
    return (h, state), _tangent(cell, walk, h, reads, dwalk._replace(starts=None))


@partial(jax.checkpoint, static_argnums=(0,))
def _tangent(cell: Cell, walk: Inputs, h: Array, reads: Array, dwalk: Inputs) -> tuple[Array, Array]:
    """The tangents of h and the last state: linear in `dwalk`."""
    dtype = walk.initial_state.dtype
    before = jnp.concatenate([walk.initial_state[0].astype(h.dtype)[None], h[:-1]])
    if walk.starts is not None:
        before = jnp.where(walk.starts[:, None, :, None], 0, before)

    def pre_activations(given: Inputs) -> Array:
        """[T, H, B, P * D]"""
        x = given.gates.astype(dtype)
        # Heads in front of time for this one: XLA's CPU has bfloat16 products only so.
        r_HTBG = _product(before.swapaxes(0, 1), given.recurrent, dtype)
        r = r_HTBG.swapaxes(0, 1) + given.bias[None, :, None].astype(dtype)
        if cell.inputs == cell.recurrent:
            return x + r
        return jnp.concatenate(cell.combine(_split(x, cell.gates), _split(r, cell.gates)), axis=-1)

    @partial(
        jax.checkpoint, prevent_cse=False
    )  # what a step multiplies by is computed again in the walk back
    def step(dstate, token):
        pre, reads, dpre, start_B = token
        dstate = [_fresh(start_B, ds) for ds in dstate]
        pre, dpre = (_split(y, cell.pre_activations) for y in (pre, dpre))
        dpre = cell.add(dpre, _split(_product(dstate[0], walk.recurrent, dtype), cell.gates))
        _, dstate = jax.jvp(cell.step, (pre, reads), (dpre, [dstate[s] for s in cell.reads]))
        return dstate, dstate[0].astype(h.dtype)

    read = [reads[:, :, r] for r in range(len(cell.reads))]
    tokens = pre_activations(walk), read, pre_activations(dwalk), walk.starts
    dstate, dh = jax.lax.scan(step, tuple(dwalk.initial_state), tokens)
    return dh, jnp.stack(dstate)
