"""Windowed attention a few scores at a time: the numbers of all at once, in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.layers.mixers import sliding_window
from tests.errors import assert_close

B, H, D = 2, 2, 4


def whole(q, k, v, place):
    """The definition: softmax over all keys that a query sees."""
    T, S = q.shape[1], k.shape[1]
    back = (jnp.arange(T)[:, None] + (S - T) - jnp.arange(S)[None])[None, None]
    sees = (back >= 0) & (back <= jnp.minimum(place, S - T)[:, None, :, None])
    score = jnp.where(sees, jnp.einsum("bthd,bshd->bhts", q, k) / D**0.5, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(score), v)


def both(f, weight):
    return jax.jit(
        jax.value_and_grad(
            lambda q, k, v, p: (lambda o: (jnp.sum(o * weight), o))(f(q, k, v, p)), (0, 1, 2), True
        )
    )


@pytest.mark.parametrize(
    ("tokens", "window", "scores"),
    [
        (23, 5, 120),  # two blocks a step, with a step that is not full
        pytest.param(37, 5, 30, marks=pytest.mark.full),  # parts of a block
        pytest.param(19, 30, 200, marks=pytest.mark.full),  # a window longer than the call
        pytest.param(40, 8, 1, marks=pytest.mark.full),  # one query at a time
    ],
)
def test_some_scores_at_a_time_give_the_same(monkeypatch, tokens, window, scores):
    monkeypatch.setattr(sliding_window, "SCORES", scores)
    q, weight = jax.random.normal(jax.random.key(0), (2, B, tokens, H, D))
    k, v = jax.random.normal(jax.random.key(1), (2, B, tokens + window - 1, H, D))
    place = np.arange(tokens)[None] + np.array([[0], [window]])
    place[:, 11:] = np.arange(tokens - 11)  # a document starts
    args = q, k, v, jnp.asarray(place)
    (_, out), gradients = both(sliding_window.window_attention, weight)(*args)
    (_, want_out), want = both(whole, weight)(*args)
    assert_close((out, gradients), (want_out, want), "float32")


def test_long_rows_hold_few_scores(monkeypatch):
    tokens, window = 1024, 128
    x = jax.ShapeDtypeStruct((1, tokens, 1, D), jnp.float32)
    k = jax.ShapeDtypeStruct((1, tokens + window - 1, 1, D), jnp.float32)
    place = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    sizes = []
    for scores in (2**21, 2**13):
        monkeypatch.setattr(sliding_window, "SCORES", scores)
        run = both(functools.partial(sliding_window.window_attention), jnp.ones(()))
        sizes.append(run.lower(x, k, k, place).compile().memory_analysis().temp_size_in_bytes)
    at_once, few = sizes
    assert at_once > 4 * tokens * 2 * window, sizes  # the scores, in float32
    assert few < at_once / 4, sizes
