"""The portable form, which CPU gets: a token loop that writes in place, differentiated as a linear system.

h solves (I - A) h = b, where A shifts h by a token and multiplies it by a, so a tangent of h solves it too:
(I - A) dh = da * h_{t-1} + db. Told so (`custom_linear_solve`), jax finds derivatives of any order, forward
and reverse, and each is the same loop again: the transposed system is the recurrence read the other way.
Nothing divides by a product of a's, nor lets one overflow, as chunked and associative forms do.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from .inputs import Inputs


def forward(inputs: Inputs, reverse: bool) -> tuple[Array, Array]:
    """h_t = a_t * h_{t-1} + b_t; from the last token to the first if `reverse`."""
    return _recurrence(reverse, *inputs)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrence(reverse, a_BTD, b_BTD, s_BD, starts_BT):
    return _loop(a_BTD, b_BTD, s_BD, reverse, forget=starts_BT is not None)


@_recurrence.defjvp
def _tangent(reverse, primals, tangents):
    a, b, s, starts = primals
    da, db, ds, _ = tangents
    h, state = _recurrence(reverse, a, b, s, starts)
    first, last = (-1, 0) if reverse else (0, -1)
    a, before, da, db = (x.astype(s.dtype) for x in (a, _before(s, h, reverse), da, db))
    if starts is not None:
        before = jnp.where(starts[:, :, None] == 1, 0, before)
    source = (da * before + db).at[:, first].add(a[:, first] * ds)
    dh = _solve(a, source, reverse, forget=starts is not None)
    return (h, state), (dh.astype(h.dtype), dh[:, last])


def _solve(a, b, reverse, forget):
    """The recurrence from a zero state, as a linear function of b that jax can transpose."""
    after = 1 if not reverse else -1  # g_t = dh_t + a_{t+1} g_{t+1}
    return lax.custom_linear_solve(
        lambda h: h - a * _before(jnp.zeros_like(h[:, 0]), h, reverse),
        b,
        lambda _, b: _loop(a, b, jnp.zeros_like(b[:, 0]), reverse, forget)[0],
        lambda _, g: _loop(a, g, jnp.zeros_like(g[:, 0]), not reverse, forget, a_offset=after)[0],
    )


def _before(s_BD: Array, h_BTD: Array, reverse: bool) -> Array:
    """The state that each token reads: s, then h without its last."""
    s_B1D = s_BD[:, None].astype(h_BTD.dtype)
    if reverse:
        return jnp.concatenate([h_BTD[:, 1:], s_B1D], axis=1)
    return jnp.concatenate([s_B1D, h_BTD[:, :-1]], axis=1)


def _loop(
    a_BTD: Array, b_BTD: Array, s_BD: Array, reverse: bool, forget: bool, a_offset: int = 0
) -> tuple[Array, Array]:
    """h_t = a_{t + a_offset} * h_{t-1} + b_t. With an offset the first token has no a, so s must be zero.

    With `forget` zero times NaN or infinity is zero.
    """
    T = b_BTD.shape[1]

    def step(i, carry):
        s_BD, h_BTD = carry
        t = T - 1 - i if reverse else i
        a_BD, b_BD = (
            lax.dynamic_index_in_dim(x, at, 1, keepdims=False).astype(s_BD.dtype)
            for x, at in ((a_BTD, t + a_offset), (b_BTD, t))
        )
        kept_BD = jnp.where(a_BD == 0, 0, a_BD * s_BD) if forget else a_BD * s_BD
        s_BD = kept_BD + b_BD
        return s_BD, lax.dynamic_update_index_in_dim(h_BTD, s_BD.astype(h_BTD.dtype), t, 1)

    state, h = lax.fori_loop(0, T, step, (s_BD, jnp.zeros_like(b_BTD)))
    return h, state
