"""The states of linear attention after some of a row's tokens, in plain JAX: for `segment_states`."""

import jax
import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator
from .inputs import Inputs, repeat_heads

CHUNK = 64


@jax.checkpoint  # keeps the inputs, and no states
def states_at(call: Inputs, places: Array) -> Array:
    """The states [B, N, H, K, V] after the tokens `places` [B, N]; -1 is the state before the first.

    One pass gives the state before each chunk of tokens; each place then adds the tokens of its own chunk.
    """
    B, T, _, K = call.q.shape
    H, V = call.heads, call.v.shape[-1]
    dtype = accumulator(call.q.dtype)
    C = min(CHUNK, T)
    M = -(-T // C)  # chunks

    def chunks(x: Array, mode: str = "constant") -> Array:
        """[B, T, ...] -> [B, M, C, ...]"""
        x = jnp.pad(x, [(0, 0), (0, M * C - T)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        return x.reshape(B, M, C, *x.shape[2:])

    k_BMCHK, v_BMCHV = (chunks(repeat_heads(x, H)) for x in (call.k, call.v))
    g_BTHK = jnp.zeros((1, 1, 1, 1), dtype) if call.log_decay is None else call.log_decay.astype(dtype)
    if call.log_decay is not None and call.log_decay.ndim < 4:
        g_BTHK = g_BTHK[..., None] if g_BTHK.ndim == 3 else g_BTHK[None, None, :, None]
    g_BMCHK = chunks(jnp.broadcast_to(g_BTHK, (B, T, H, g_BTHK.shape[-1])))
    index = jnp.zeros((B, T), jnp.int32) if call.runs is None else call.runs
    index_BMC = chunks(index, "edge")
    entering_BM = jnp.pad(index_BMC[:, :-1, -1], ((0, 0), (1, 0)))

    def added(k, v, g, own):
        """The share that tokens [..., C, H] of the document `own` [..., C] add to the state after them."""
        after = _behind(g)
        k = jnp.where(own[..., None, None], k.astype(dtype) * jnp.exp(after), 0).astype(v.dtype)
        v = jnp.where(own[..., None, None], v, 0)
        return jnp.einsum("bnchk,bnchv->bnhkv", k, v, precision="highest", preferred_element_type=dtype)

    def kept(g, goes_on):
        """The share that is left of the state before tokens [B, n, C, H]: [B, n, H, K or 1, 1]."""
        total = jnp.sum(g, axis=2)
        return jnp.where(goes_on[..., None, None], jnp.exp(total), 0)[..., None]

    last_BM = index_BMC[:, :, -1]
    new = added(k_BMCHK, v_BMCHV, g_BMCHK, index_BMC == last_BM[..., None])
    left = kept(g_BMCHK, entering_BM == last_BM)

    def step(S, this):
        left, new = this
        return jnp.where(left == 0, 0, left * S) + new, S

    first = jnp.zeros((B, H, K, V), dtype)
    first = first if call.initial_state is None else call.initial_state.astype(dtype)
    _, before = jax.lax.scan(step, first, (jnp.moveaxis(left, 1, 0), jnp.moveaxis(new, 1, 0)))
    before_BMHKV = jnp.moveaxis(before, 0, 1)

    place = jnp.maximum(places, 0)
    m_BN, c_BN = place // C, place % C
    picked = [
        jnp.take_along_axis(x, m_BN.reshape(*m_BN.shape, *[1] * (x.ndim - 2)), axis=1)
        for x in (before_BMHKV, k_BMCHK, v_BMCHV, g_BMCHK, index_BMC, entering_BM)
    ]
    S, k, v, g, index, entering = picked
    up_to = jnp.arange(C)[None, None] <= c_BN[..., None]
    g = jnp.where(up_to[..., None, None], g, 0)
    its = jnp.take_along_axis(index, c_BN[..., None], axis=2)
    left = kept(g, entering == its[..., 0])
    S = jnp.where(left == 0, 0, left * S) + added(k, v, g, up_to & (index == its))
    return jnp.where((places >= 0)[..., None, None, None], S, first[:, None])


def _behind(g: Array) -> Array:
    """The sum of what stands behind each token of g [B, n, C, ...]: sums of a few, no differences."""
    total = jax.lax.cumsum(g, axis=2, reverse=True)
    return jnp.pad(total[:, :, 1:], [(0, 0), (0, 0), (0, 1)] + [(0, 0)] * (g.ndim - 3))
