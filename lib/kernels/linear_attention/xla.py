"""Linear attention in chunks of tokens, in plain JAX: what CPU, older GPUs and unserved calls get.

Inside a chunk the output is a masked, decayed product of queries and keys; a state carries what came before
(GLA, arXiv 2312.06635). Chunks go through in groups: what lies inside chunks is one batch of products, so
that short rows fill the machine too. The loop over groups is rematerialized, so the gradient keeps the inputs
and one state a group.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..common.arguments import accumulator, known, operand_dtype
from ..common.sharding import vary_like
from .features import widen
from .inputs import Inputs, feature_count, repeat_heads

CHUNK = 64
TOGETHER = 128  # chunks, counted over rows and heads, in a group; half of it with a decay a channel
WITH_FEATURES = 16  # the same where a group's features take the memory
LONGEST = 32  # chunks of one row in a group: the loop over their states is written out


@partial(jax.jit, static_argnames=("scale", "feature_map"))
def forward(inputs: Inputs, scale: float, feature_map: str | None = None) -> tuple[Array, Array]:
    """The contract of `linear_attention`, for checked inputs."""
    B, T = inputs.q.shape[:2]
    K = feature_count(inputs.q.shape[3], feature_map)
    H, V, out_dtype = inputs.heads, inputs.v.shape[-1], inputs.v.dtype
    dtype, operand = accumulator(inputs.q.dtype), operand_dtype(inputs.q.dtype)
    inputs = inputs._replace(**{n: getattr(inputs, n).astype(operand) for n in "qkv"})
    per_channel = inputs.log_decay is not None and inputs.log_decay.ndim == 4
    C = min(CHUNK, 1 << (T - 1).bit_length()) if known(T) else CHUNK  # a power of two, not above T
    together = TOGETHER // 2 if per_channel else TOGETHER if feature_map is None else WITH_FEATURES
    N = min(LONGEST, max(1, together // (H * (B if known(B) else 1))))
    L = -(-T // (C * N))  # groups
    if known(T):
        N = -(-T // (C * L))  # chunks in each

    def groups(x_BT):
        """[B, T, ...] -> [L, B, N, C, ...]; the padding adds nothing to a state and does not decay it."""
        x_BT = jnp.pad(x_BT, [(0, 0), (0, L * N * C - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, L, N, C, *x_BT.shape[2:]), 1, 0)

    score_heads = max(inputs.q.shape[2], inputs.k.shape[2])  # Mamba-2's groups share their scores
    q, k = (repeat_heads(x, score_heads) for x in (inputs.q, inputs.k))
    g = inputs.log_decay
    if g is not None:
        g = g.astype(dtype)[..., None] if g.ndim < 4 else g.astype(dtype)
        g = groups(jnp.broadcast_to(g, (B, T, H, g.shape[-1])))
    runs = entering = None
    if inputs.runs is not None:
        tail = jnp.broadcast_to(inputs.runs[:, -1:], (B, L * N * C - T))
        runs = jnp.concatenate([inputs.runs, tail], 1).reshape(B, L * N, C)
        entering = jnp.concatenate([jnp.zeros_like(runs[:, :1, 0]), runs[:, :-1, -1]], 1)
        runs, entering = (jnp.moveaxis(x.reshape(B, L, N, *x.shape[2:]), 1, 0) for x in (runs, entering))
    state = vary_like(jnp.zeros((B, H, K, V), dtype), inputs)
    if inputs.initial_state is not None:
        state = inputs.initial_state.astype(dtype)

    xs = (groups(q), groups(k), groups(repeat_heads(inputs.v, H)), g, runs, entering)
    step = partial(_group, scale, feature_map, inputs.bonus)
    if L == 1:
        state, out = step(state, jax.tree.map(lambda x: x[0], xs))
        out = out[None]
    else:
        # Scores per channel cost an exp for each of their factors: they are kept, all else is computed again.
        keep = jax.checkpoint_policies.dots_saveable if per_channel else None
        state, out = jax.lax.scan(jax.checkpoint(step, prevent_cse=False, policy=keep), state, xs)
    out_BTHV = jnp.moveaxis(out, 0, 1).reshape(B, L * N * C, H, V)[:, :T]
    return out_BTHV.astype(out_dtype), state


def _group(scale, feature_map, bonus_HK, S_BHKV, x):
    """A group of N chunks: (state before, its tokens) -> (state after, out_BNCHV)."""
    q_BNGCK, k_BNGCK, v_BNHCV = (y.swapaxes(2, 3) for y in x[:3])  # G heads of scores, H of values and decays
    q_BNGCK, k_BNGCK = widen(q_BNGCK, feature_map), widen(k_BNGCK, feature_map)
    g, runs_BNC, entering_BN = x[3:]
    dtype, C, H = S_BHKV.dtype, q_BNGCK.shape[3], S_BHKV.shape[1]
    per_channel = g is not None and g.shape[-1] > 1
    if per_channel:
        q_BNGCK, k_BNGCK = (repeat_heads(y, H, 2) for y in (q_BNGCK, k_BNGCK))

    # Scores, lower triangular. The diagonal stands apart: no decay lies between a token and itself.
    qk_BNGCK = q_BNGCK.astype(dtype) * k_BNGCK.astype(dtype)
    if bonus_HK is None:
        u_BNHC = jnp.sum(qk_BNGCK, -1)
    else:
        u_BNHC = jnp.sum(repeat_heads(qk_BNGCK, H, 2) * bonus_HK[None, None, :, None].astype(dtype), -1)
    exclusive = bonus_HK is not None
    if per_channel:
        A, before, after, total = _decayed(q_BNGCK, k_BNGCK, g.swapaxes(2, 3), u_BNHC, exclusive)
    else:
        A = _dot("bngik,bngjk->bngij", q_BNGCK, k_BNGCK, dtype)
        if g is None:
            A = jnp.where(jnp.tril(jnp.ones((C, C), bool), -1 if exclusive else 0), A, 0)
        else:
            g = g.swapaxes(2, 3)
            one = jnp.ones_like(g)
            diagonal = jnp.zeros_like(one[..., 0]) if exclusive else one[..., 0]
            decay, before, after, total = _decayed(one, one, g, diagonal, exclusive)
            A = repeat_heads(A, H, 2) * decay
        if exclusive:
            A = A + jnp.eye(C, dtype=dtype)[None, None, None] * u_BNHC[..., None]
    A = repeat_heads(A, H, 2)

    q, k = (repeat_heads(y, H, 2).astype(dtype) for y in (q_BNGCK, k_BNGCK))
    kept = None
    if g is not None:
        q, k, kept = q * jnp.exp(before), k * jnp.exp(after), jnp.exp(total)[..., None]
    if runs_BNC is not None:  # nothing crosses from one document to another
        last_BN1 = runs_BNC[:, :, -1:]
        A = jnp.where((runs_BNC[..., :, None] == runs_BNC[..., None, :])[:, :, None], A, 0)
        q = jnp.where((runs_BNC == entering_BN[..., None])[:, :, None, :, None], q, 0)
        k = jnp.where((runs_BNC == last_BN1)[:, :, None, :, None], k, 0)
        goes_on = (entering_BN[..., None] == last_BN1)[..., None, None]
        kept = goes_on.astype(dtype) if kept is None else jnp.where(goes_on, kept, 0)

    v = v_BNHCV
    new_BNHKV = _dot("bnhjk,bnhjv->bnhkv", k.astype(v.dtype), v, dtype)
    S_BHKV, S_BNHKV = _states(S_BHKV, kept, new_BNHKV)
    out = _dot("bnhij,bnhjv->bnhiv", A.astype(v.dtype), v, dtype)
    out += _dot("bnhik,bnhkv->bnhiv", q.astype(v.dtype), S_BNHKV.astype(v.dtype), dtype)
    return S_BHKV, (scale * out).swapaxes(2, 3)


def _states(S_BHKV, kept, new_BNHKV):
    """The state after a group, and the state before each of its chunks [B, N, H, K, V]."""
    kept = [1] * new_BNHKV.shape[1] if kept is None else jnp.unstack(kept, axis=1)
    before = []
    for kept_BH, new_BHKV in zip(kept, jnp.unstack(new_BNHKV, axis=1), strict=True):
        before.append(S_BHKV)
        S_BHKV = kept_BH * S_BHKV + new_BHKV
    return S_BHKV, jnp.stack(before, 1)


def _dot(equation: str, x: Array, y: Array, dtype) -> Array:
    """Operands in their own dtype, sums in `dtype`: float32 operands are not rounded on any platform."""
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=dtype)


def _decayed(q, k, g, diagonal, exclusive: bool):
    """A[i, j] = sum_c q[i, c] k[j, c] exp(sum of g[s, c] over j < s <= i) for j < i, zero for j > i.

    By halves: rows i of a right half meet columns j of its left half at the middle, exp(g from the middle to
    i) on one side and exp(g from j to the middle) on the other. Both exponents are sums of a few gates, never
    differences of long sums: no exp of a positive number, no cancellation however strong the gates.

    Args:
      q, k: [..., C, K], C a power of two. g: [..., C, K], log-decays.
      diagonal: [..., C], what A holds there.
      exclusive: the row's own gate does not count (sums over j < s < i).

    Returns:
      A [..., C, C]; before [..., C, K], the sum of the gates up to each row (its own unless `exclusive`);
      after [..., C, K], the sum of the gates behind each column; total [..., K].
    """
    *lead, C, K = q.shape
    dtype = g.dtype
    before, after, total = jnp.zeros_like(g) if exclusive else g, jnp.zeros_like(g), g
    A = diagonal[..., None, None]  # [..., blocks, h, h]
    h = 1  # half the width of the blocks that this level joins
    while h < C:
        join = partial(jnp.reshape, shape=(*lead, C // (2 * h), 2, h, K))
        rows = join(q)[..., 1, :, :].astype(dtype) * jnp.exp(join(before)[..., 1, :, :])
        columns = join(k)[..., 0, :, :].astype(dtype) * jnp.exp(join(after)[..., 0, :, :])
        corner = _dot("...ik,...jk->...ij", rows.astype(q.dtype), columns.astype(k.dtype), dtype)
        halves = A.reshape(*lead, C // (2 * h), 2, h, h)
        top = jnp.pad(halves[..., 0, :, :], [(0, 0)] * (len(lead) + 2) + [(0, h)])
        A = jnp.concatenate([top, jnp.concatenate([corner, halves[..., 1, :, :]], -1)], -2)

        left, right = (total.reshape(*lead, C // (2 * h), 2, K)[..., i, :] for i in (0, 1))
        none = jnp.zeros_like(left)
        before = (join(before) + jnp.stack([none, left], -2)[..., None, :]).reshape(g.shape)
        after = (join(after) + jnp.stack([right, none], -2)[..., None, :]).reshape(g.shape)
        total = left + right
        h *= 2
    return A[..., 0, :, :], before, after, total[..., 0, :]
