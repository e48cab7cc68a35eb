"""Work that the kernels leave to XLA: one product over all tokens instead of one a step."""

import jax.numpy as jnp
from jax import Array

from .inputs import Inputs


def before(call: Inputs, h: Array) -> Array:
    """The h [B, T, H, D] that each token's R is multiplied by, in gates' dtype."""
    first = call.initial_state[:, None, 0].astype(h.dtype)
    moved = jnp.concatenate([first, h[:, :-1]], axis=1)
    return moved if call.starts is None else jnp.where(call.starts[:, :, None, None], 0, moved)


def pre_activations(call: Inputs, h: Array) -> Array:
    """[B, T, H, P, D] in the accumulator's dtype."""
    dtype = call.initial_state.dtype
    r = jnp.einsum(
        "bthi,hgio->bthgo", before(call, h), call.recurrent, precision="highest", preferred_element_type=dtype
    )
    x, r = call.gates.astype(dtype), r + call.bias.astype(dtype)[None, None]
    if call.cell.inputs == call.cell.recurrent:
        return x + r
    split = ([y[..., g, :] for g in range(call.cell.gates)] for y in (x, r))
    return jnp.stack(call.cell.combine(*split), axis=3)


def matrix_gradients(call: Inputs, h: Array, dpre: Array) -> Inputs:
    """The gradients of gates, recurrent and bias from that of the pre-activations [B, T, H, P, D]."""
    dtype = call.initial_state.dtype
    cell = call.cell
    dx = dr = dpre
    if cell.inputs != cell.recurrent:
        dx, dr = (
            jnp.stack([dpre[..., p, :] for p in places], axis=3) for places in (cell.inputs, cell.recurrent)
        )
    drecurrent = jnp.einsum(
        "bthi,bthgo->hgio",
        before(call, h),
        dr.astype(h.dtype),
        precision="highest",
        preferred_element_type=dtype,
    )
    return Inputs(
        gates=dx.astype(call.gates.dtype),
        recurrent=drecurrent.astype(call.recurrent.dtype),
        bias=dr.astype(dtype).sum((0, 1)).astype(call.bias.dtype),
        initial_state=call.initial_state,
        starts=None,
    )
