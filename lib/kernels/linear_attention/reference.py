"""Linear attention as the equation says it, one token at a time: what every backend is held to."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator
from ..common.sharding import vary_like
from .features import widened
from .inputs import Inputs, repeat_heads


@partial(jax.jit, static_argnames=("scale", "feature_map"))
def forward(inputs: Inputs, scale: float, feature_map: str | None = None) -> tuple[Array, Array]:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T;  o_t = scale * q_t S_t.

    With a bonus u (RWKV-6) the token reads the state before its own decay:
    o_t = scale * q_t (S_{t-1} + diag(u) k_t v_t^T). With a feature map q and k are features of those given.
    """
    dtype = accumulator(inputs.q.dtype)
    H, out_dtype = inputs.heads, inputs.v.dtype
    inputs = inputs._replace(**{n: getattr(inputs, n).astype(dtype) for n in "qkv"})
    inputs = widened(inputs, feature_map)
    q, k, v = (repeat_heads(x, H) for x in (inputs.q, inputs.k, inputs.v))
    B, T, _, K = q.shape
    V = v.shape[-1]

    if inputs.log_decay is None:
        decay = jnp.ones((B, T, H, K), dtype)
    else:
        g = inputs.log_decay.astype(dtype)
        g = g[..., None] if g.ndim != 4 else g  # one decay a head is the same decay in every channel
        decay = jnp.broadcast_to(jnp.exp(g), (B, T, H, K))
    starts = jnp.zeros((B, T), bool)
    if inputs.runs is not None:
        starts = starts.at[:, 1:].set(inputs.runs[:, 1:] != inputs.runs[:, :-1])
    state = vary_like(jnp.zeros((B, H, K, V), dtype), q)
    if inputs.initial_state is not None:
        state = inputs.initial_state.astype(dtype)

    def step(S_BHKV, token):
        q_BHK, k_BHK, v_BHV, a_BHK, start_B = token
        S_BHKV = jnp.where(start_B[:, None, None, None], 0, S_BHKV)
        kv_BHKV = k_BHK[..., :, None] * v_BHV[..., None, :]
        if inputs.bonus is None:
            S_BHKV = a_BHK[..., None] * S_BHKV + kv_BHKV
            read_BHKV = S_BHKV
        else:
            read_BHKV = S_BHKV + inputs.bonus.astype(dtype)[None, ..., None] * kv_BHKV
            S_BHKV = a_BHK[..., None] * S_BHKV + kv_BHKV
        return S_BHKV, scale * jnp.einsum("bhk,bhkv->bhv", q_BHK, read_BHKV, precision="highest")

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay, starts))
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(out_dtype), state
