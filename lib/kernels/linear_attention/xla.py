"""Linear attention in chunks of tokens, in plain JAX: what CPU, older GPUs and unserved calls get.

Inside a chunk the output is a masked, decayed product of queries and keys; a state carries what came before
(GLA, arXiv 2312.06635). The loop is rematerialized, so the gradient keeps the inputs and one state a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..arguments import accumulator
from ..sharding import vary_like
from .inputs import Inputs, repeat_heads

CHUNK = 64


@partial(jax.jit, static_argnames="scale")
def forward(inputs: Inputs, scale: float) -> tuple[Array, Array]:
    """The contract of `linear_attention`, for checked inputs."""
    B, T, _, K = inputs.q.shape
    H, V = inputs.heads, inputs.v.shape[-1]
    dtype = accumulator(inputs.q.dtype)
    C = min(CHUNK, 1 << (T - 1).bit_length())  # a power of two, no longer than T needs
    N = -(-T // C)

    def chunks(x_BT):
        """[B, T, ...] -> [N, B, C, ...]; the padding adds nothing to a state and does not decay it."""
        x_BT = jnp.pad(x_BT, [(0, 0), (0, N * C - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, N, C, *x_BT.shape[2:]), 1, 0)

    score_heads = max(inputs.q.shape[2], inputs.k.shape[2])  # Mamba-2's groups share their scores
    q, k = (repeat_heads(x, score_heads) for x in (inputs.q, inputs.k))
    g = inputs.log_decay
    if g is not None:
        g = g.astype(dtype)[..., None] if g.ndim < 4 else g.astype(dtype)
        g = chunks(jnp.broadcast_to(g, (B, T, H, g.shape[-1]))).swapaxes(2, 3)
        if g.shape[-1] == 1:  # one decay a head: small enough to prepare for all chunks at once
            one, exclusive = jnp.ones_like(g), inputs.bonus is not None
            g = _decayed(one, one, g, jnp.zeros_like(one[..., 0]) if exclusive else one[..., 0], exclusive)
    runs = entering = None
    if inputs.runs is not None:
        runs = jnp.pad(inputs.runs, ((0, 0), (0, N * C - T)), mode="edge").reshape(B, N, C).swapaxes(0, 1)
        entering = jnp.concatenate([jnp.zeros_like(runs[:1, :, 0]), runs[:-1, :, -1]])  # [N, B]
    state = vary_like(jnp.zeros((B, H, K, V), dtype), inputs)
    if inputs.initial_state is not None:
        state = inputs.initial_state.astype(dtype)

    # Scores per channel cost an exp for each of their factors: those are kept, all else is computed again.
    keep = jax.checkpoint_policies.dots_saveable if g is not None and not isinstance(g, tuple) else None
    step = jax.checkpoint(partial(_chunk, scale, inputs.bonus), prevent_cse=False, policy=keep)
    xs = (chunks(q), chunks(k), chunks(repeat_heads(inputs.v, H)), g, runs, entering)
    if N == 1:
        state, out = step(state, jax.tree.map(lambda x: x[0], xs))
        out = out[None]
    else:
        state, out = jax.lax.scan(step, state, xs)
    out_BTHV = jnp.moveaxis(out, 0, 1).reshape(B, N * C, H, V)[:, :T]
    return out_BTHV.astype(inputs.v.dtype), state


def _chunk(scale, bonus_HK, S_BHKV, x):
    """One chunk: (state before, its tokens) -> (state after, out_BCHV)."""
    q_BGCK, k_BGCK, v_BHCV = (y.swapaxes(1, 2) for y in x[:3])  # G heads of scores, H of values and decays
    g, runs_BC, entering_B = x[3:]
    dtype, C, H = S_BHKV.dtype, q_BGCK.shape[2], S_BHKV.shape[1]
    per_channel = g is not None and not isinstance(g, tuple)
    if per_channel:
        q_BGCK, k_BGCK = (repeat_heads(y, H, 1) for y in (q_BGCK, k_BGCK))

    # Scores, lower triangular. The diagonal stands apart: no decay lies between a token and itself.
    qk_BGCK = q_BGCK.astype(dtype) * k_BGCK
    if bonus_HK is None:
        u_BHC = jnp.sum(qk_BGCK, -1)
    else:
        u_BHC = jnp.sum(repeat_heads(qk_BGCK, H, 1) * bonus_HK[:, None].astype(dtype), -1)
    if g is None:
        lower_CC = jnp.tril(jnp.ones((C, C), bool), 0 if bonus_HK is None else -1)
        A_BHCC = jnp.where(lower_CC, _dot("bhik,bhjk->bhij", q_BGCK, k_BGCK, dtype), 0)
    elif per_channel:
        A_BHCC, before, after, total = _decayed(q_BGCK, k_BGCK, g, u_BHC, bonus_HK is not None)
    else:
        decay_BHCC, before, after, total = g
        A_BHCC = repeat_heads(_dot("bhik,bhjk->bhij", q_BGCK, k_BGCK, dtype), H, 1) * decay_BHCC
    if bonus_HK is not None and not per_channel:
        A_BHCC = A_BHCC + jnp.eye(C, dtype=dtype) * u_BHC[..., None]

    q_BHCK, k_BHCK = (repeat_heads(y, H, 1).astype(dtype) for y in (q_BGCK, k_BGCK))
    A_BHCC = repeat_heads(A_BHCC, H, 1)
    if g is not None:
        q_BHCK, k_BHCK = q_BHCK * jnp.exp(before), k_BHCK * jnp.exp(after)
        S_kept = jnp.exp(total)[..., None] * S_BHKV
    else:
        S_kept = S_BHKV
    if runs_BC is not None:  # nothing crosses from one document to another
        A_BHCC = jnp.where((runs_BC[:, :, None] == runs_BC[:, None, :])[:, None], A_BHCC, 0)
        q_BHCK = jnp.where((runs_BC == entering_B[:, None])[:, None, :, None], q_BHCK, 0)
        k_BHCK = jnp.where((runs_BC == runs_BC[:, -1:])[:, None, :, None], k_BHCK, 0)
        S_kept = jnp.where((entering_B == runs_BC[:, -1])[:, None, None, None], S_kept, 0)

    operand = v_BHCV.dtype
    out_BHCV = _dot("bhij,bhjv->bhiv", A_BHCC.astype(operand), v_BHCV, dtype)
    out_BHCV += _dot("bhik,bhkv->bhiv", q_BHCK.astype(operand), S_BHKV.astype(operand), dtype)
    S_BHKV = S_kept + _dot("bhjk,bhjv->bhkv", k_BHCK.astype(operand), v_BHCV, dtype)
    return S_BHKV, (scale * out_BHCV).swapaxes(1, 2)


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
        rows = join(q)[..., 1, :, :] * jnp.exp(join(before)[..., 1, :, :])
        columns = join(k)[..., 0, :, :] * jnp.exp(join(after)[..., 0, :, :])
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
