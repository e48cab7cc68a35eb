"""The portable form: a loop over tokens in chunks, of which only the state before each is kept.

What sums over N or over channels is written as a matrix product, which CPUs do fastest. `forward` is plain
JAX, so that it has derivatives of any order; `backward` is its gradient by hand, which is what training runs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..common.arguments import known
from ..common.sharding import vary_like
from .inputs import Inputs, finish, no_states, step_size

CHUNK = 32  # tokens: the states kept are N / CHUNK times as large as x

_einsum = partial(jnp.einsum, precision="highest")


class _Tokens(NamedTuple):
    """The terms that each token brings: time first."""

    dt: Array  # [B, D]
    source: Array  # [B, D], dt * x
    B: Array  # [B, N]
    C: Array  # [B, N]
    starts: Array | None  # [B]


@partial(jax.jit, static_argnames=("softplus", "keep"))
def forward(call: Inputs, softplus: bool, keep: bool = False) -> tuple[Array, ...]:
    """y [B, T, D] in x's dtype and the final state [B, D, N]; with `keep` also `no_states`."""
    chunk = jax.checkpoint(partial(_chunk, call.A.T))
    state_BND, y = lax.scan(chunk, _first_state(call), _chunked(_tokens(call, softplus)))
    results = finish(call, _whole(y, call)), jnp.swapaxes(state_BND, 1, 2)
    return (*results, no_states(call)) if keep else results


@partial(jax.jit, static_argnames="softplus")
def backward(call: Inputs, states: Array, cotangents: tuple[Array, Array], softplus: bool) -> Inputs:
    """The gradient of each input, in its shape and dtype; None where the input is None."""
    del states
    integers = call.starts
    floats = call._replace(starts=None)
    tokens, pull_tokens = jax.vjp(lambda c: _tokens(c, softplus), floats)
    tokens = _chunked(tokens._replace(starts=_time_first(integers)))
    A_ND = call.A.T

    def keep_first(h_BND, tokens):
        last, y = _chunk(A_ND, h_BND, tokens)
        return last, (h_BND, y)

    _, (firsts, y) = lax.scan(keep_first, _first_state(call), tokens)
    _, pull_finish = jax.vjp(finish, floats, _whole(y, call))
    around, dy_BTD = pull_finish(cotangents[0])
    dy = _chunked(_time_first(dy_BTD))

    def chunk(carry, this):
        (tokens, dy), h_BND = this
        _, (befores, dC) = lax.scan(partial(_recompute, A_ND), h_BND, (tokens, dy))
        carry, (ddt, dsource, dB) = lax.scan(
            partial(_reverse, A_ND), carry, (tokens, dy, befores), reverse=True
        )
        return carry, _Tokens(ddt, dsource, dB, dC, None)

    dstate_BND = vary_like(jnp.swapaxes(cotangents[1], 1, 2), (call, cotangents))
    carry = dstate_BND, jnp.zeros_like(dstate_BND)
    (dstate_BND, dA_BND), dtokens = lax.scan(chunk, carry, ((tokens, dy), firsts), reverse=True)
    T = call.x.shape[1]
    (through,) = pull_tokens(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], dtokens))
    gradient = jax.tree.map(jnp.add, around, through)
    return gradient._replace(
        A=jnp.sum(dA_BND, 0).T, initial_state=jnp.swapaxes(dstate_BND, 1, 2), starts=None
    )


def _chunk(A_ND: Array, h_BND: Array, tokens: _Tokens) -> tuple[Array, Array]:
    """The state after a chunk, and every C h."""

    def step(h_BND, token):
        h_BND = _next(A_ND, h_BND, token)
        return h_BND, _einsum("bn,bnd->bd", token.C, h_BND)

    return lax.scan(step, h_BND, tokens)


def _decay(A_ND: Array, token: _Tokens) -> Array:
    return jnp.exp(token.dt[:, None] * A_ND[None])


def _fresh(h_BND: Array, token: _Tokens) -> Array:
    """The state, or zeros, whatever it holds, where a document starts."""
    return h_BND if token.starts is None else jnp.where(token.starts[:, None, None] == 1, 0, h_BND)


def _next(A_ND: Array, h_BND: Array, token: _Tokens) -> Array:
    return _decay(A_ND, token) * _fresh(h_BND, token) + token.source[:, None] * token.B[..., None]


def _recompute(A_ND, h_BND, this):
    """The state that each token reads, and C's gradient."""
    token, dy_BD = this
    after_BND = _next(A_ND, h_BND, token)
    return after_BND, (_fresh(h_BND, token), _einsum("bnd,bd->bn", after_BND, dy_BD))


def _reverse(A_ND, carry, this):
    """The gradients that a token's state sends back: to the state before, to A, and to its terms."""
    from_next_BND, dA_BND = carry
    token, dy_BD, before_BND = this
    dh_BND = from_next_BND + token.C[..., None] * dy_BD[:, None]
    to_before_BND = _fresh(_decay(A_ND, token) * dh_BND, token)
    dlog_BND = to_before_BND * before_BND
    ones_N = jnp.ones(A_ND.shape[0], A_ND.dtype)
    ddt_BD = _einsum("n,bnd->bd", ones_N, dlog_BND * A_ND[None])
    dsource_BD = _einsum("bn,bnd->bd", token.B, dh_BND)
    dB_BN = _einsum("bnd,bd->bn", dh_BND, token.source)
    return (to_before_BND, dA_BND + dlog_BND * token.dt[:, None]), (ddt_BD, dsource_BD, dB_BN)


def _first_state(call: Inputs) -> Array:
    return vary_like(jnp.swapaxes(call.initial_state, 1, 2), call)


def _tokens(call: Inputs, softplus: bool) -> _Tokens:
    dt_BTD = step_size(call, softplus)
    tokens = _Tokens(dt_BTD, dt_BTD * call.x.astype(dt_BTD.dtype), call.B, call.C, call.starts)
    return jax.tree.map(_time_first, tokens)


def _time_first(x: Array | None) -> Array | None:
    return None if x is None else jnp.moveaxis(x, 1, 0)


def _chunked(tokens):
    """[chunks, CHUNK, ...], with tokens at the end that have dt = 0: they leave the state as it is."""
    T = jax.tree.leaves(tokens)[0].shape[0]
    chunk = min(CHUNK, T) if known(T) else CHUNK
    chunks = -(-T // chunk)

    def cut(x):
        x = jnp.pad(x, ((0, chunks * chunk - T), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, chunk, *x.shape[1:])

    return jax.tree.map(cut, tokens)


def _whole(y: Array, call: Inputs) -> Array:
    return jnp.moveaxis(y.reshape(-1, *y.shape[2:])[: call.x.shape[1]], 0, 1)
