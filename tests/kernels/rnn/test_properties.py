"""What must hold for any recurrent network with heads, whatever the backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

from . import definition
from .cases import Case, split

CELLS = tuple(definition.CELLS)
every_cell = pytest.mark.parametrize("cell", CELLS)


def whole_and_parts(cell, T, cut, packed):
    case = Case(cell, B=2, T=T, H=2, D=5, state=True, packed=packed)
    x, rest = split(case.arguments())

    def run(tokens, state):
        given = {**x, "gates": x["gates"][:, tokens], "initial_state": state}
        ids = {n: i[:, tokens] for n, i in rest.items()}
        return frugax.kernels.rnn(**given, **ids, cell=cell, backend="xla")

    return x, rest, run, slice(0, cut), slice(cut, T)


@every_cell
def test_split_and_carried_is_whole(cell):
    x, _, run, first, second = whole_and_parts(cell, 17, 6, packed=False)
    h1, state = run(first, x["initial_state"])
    h2, state = run(second, state)
    assert_close((jnp.concatenate([h1, h2], 1), state), run(slice(None), x["initial_state"]), "float32")


@every_cell
def test_packed_is_separate(cell):
    x, _, run, first, second = whole_and_parts(cell, 17, 6, packed=False)
    h1, _ = run(first, x["initial_state"])
    h2, state = run(second, jnp.zeros_like(x["initial_state"]))
    ids = jnp.tile((jnp.arange(17) >= 6).astype(jnp.int32), (2, 1))
    got = frugax.kernels.rnn(**x, segment_ids=ids, cell=cell, backend="xla")
    assert_close(got, (jnp.concatenate([h1, h2], 1), state), "float32")


@every_cell
def test_heads_are_the_blocks_of_one_matrix(cell):
    x, _ = split(Case(cell, B=2, T=9, H=3, D=4, state=True).arguments())
    h, state = frugax.kernels.rnn(**x, cell=cell)
    B, T, H, G, D = x["gates"].shape
    dense = np.zeros((1, G, H * D, H * D), np.float32)
    for head in range(H):
        block = slice(head * D, (head + 1) * D)
        dense[0, :, block, block] = x["recurrent"][head]
    one_head = {
        "gates": jnp.moveaxis(x["gates"], 2, 3).reshape(B, T, 1, G, H * D),
        "recurrent": jnp.asarray(dense),
        "bias": jnp.moveaxis(x["bias"], 0, 1).reshape(1, G, H * D),
        "initial_state": x["initial_state"].reshape(B, -1, 1, H * D),
    }
    got_h, got_state = frugax.kernels.rnn(**one_head, cell=cell)
    assert_close((got_h.reshape(h.shape), got_state.reshape(state.shape)), (h, state), "float32")


def test_slstm_is_its_form_without_a_stabilizer():
    """c and n times exp(m) are sums of exp(i) and sigmoid(f), which float64 holds for small gates."""
    case = Case("slstm", B=2, T=10, H=1, D=3, dtype="float64")
    a = case.arguments()
    h = np.zeros((2, 3))
    c, n, out = np.zeros((2, 3)), np.zeros((2, 3)), []
    for t in range(10):
        y = [a["gates"][:, t, 0, g] + h @ a["recurrent"][0, g] + a["bias"][0, g] for g in range(4)]
        c = definition.sigmoid(y[1]) * c + np.exp(y[0]) * np.tanh(y[2])
        n = definition.sigmoid(y[1]) * n + np.exp(y[0])
        h = definition.sigmoid(y[3]) * c / n
        out.append(h)
    with jax.enable_x64(True):
        got, state = frugax.kernels.rnn(**split(a)[0], cell="slstm")
        assert_close(got[:, :, 0], np.stack(out, 1), "float64")
        assert_close(state[:, 2, 0] * jnp.exp(state[:, 3, 0]), n, "float64")
    assert (np.asarray(state[:, 2]) >= 1).all()


@pytest.mark.parametrize("strength", [1e2, 1e4])
@every_cell
def test_strong_gates_stay_finite(cell, strength):
    x, rest = split(Case(cell, B=1, T=30, H=1, D=4, packed=True).arguments())
    x["gates"] = x["gates"] * strength

    def loss(x):
        h, state = frugax.kernels.rnn(**x, **rest, cell=cell, backend="xla")
        return jnp.sum(h**2) + jnp.sum(jnp.sin(state)), h

    gradient, h = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert jnp.isfinite(h).all()
    assert h.any()
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("backend", ["reference", "xla", None])
def test_no_gradient_crosses_a_boundary(backend):
    x, _ = split(Case("lstm", B=1, T=12, H=1, D=4, state=True).arguments())
    ids = jnp.asarray((np.arange(12) >= 5)[None].astype(np.int32))

    def second_document(x):
        h, state = frugax.kernels.rnn(**x, segment_ids=ids, backend=backend)
        return jnp.sum(h[:, 5:] ** 2) + jnp.sum(state)

    gradient = jax.grad(second_document)(x)
    assert not gradient["gates"][:, :5].any()
    assert not gradient["initial_state"].any()
    assert gradient["gates"][:, 6:].all()


def test_vmap_equals_a_loop():
    x, rest = split(Case("lstm", B=2, T=7, H=2, D=5, state=True).arguments())
    stacked = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), x)

    def with_gradient(x):
        def loss(x):
            h, state = frugax.kernels.rnn(**x, **rest)
            return jnp.sum(jnp.sin(h)) + jnp.sum(state**2)

        return jax.value_and_grad(loss)(x)

    want = [with_gradient(jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(2)]
    got = jax.jit(jax.vmap(with_gradient))(stacked)
    assert_close(got, jax.tree.map(lambda *a: jnp.stack(a), *want), "float32")


def test_gradient_keeps_h_and_what_cells_read():
    """Temporaries of forward and gradient, in arrays of h's size, do not depend on T, nor on D squared."""

    def temporaries(T, D):
        x = jax.ShapeDtypeStruct((2, T, 1, 4, D), jnp.float32)
        R = jax.ShapeDtypeStruct((1, 4, D, D), jnp.float32)

        def loss(gates, R, w):
            return jnp.sum(frugax.kernels.rnn(gates, R)[0] * w)

        w = jax.ShapeDtypeStruct((2, T, 1, D), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, R, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (2 * T * D * 4)

    # Gates with time in front, pre-activations, their gradient: 4 each; h, c, both cotangents; R twice.
    assert temporaries(512, 64) < 20
    assert temporaries(4096, 64) < 20


def test_an_elman_network_tracks_parity():
    """A state that flips with every one, which no linear recurrence with gates in (0, 1) can hold."""
    # Channels u: the bit is one and the last parity was not; v: the other way round. On is 1, off is -1:
    # the last parity is (u + v) / 2 + 1, and u = sign(bit - parity - 1/2), v = sign(parity - bit - 1/2).
    bits = np.random.default_rng(0).integers(0, 2, (1, 400))
    steep = 20.0
    h, _ = frugax.kernels.rnn(
        jnp.asarray(steep * np.stack([bits, -bits], -1)[:, :, None, None], jnp.float32),
        jnp.full((1, 1, 2, 2), steep / 2) * jnp.array([-1.0, 1.0]),
        steep * jnp.array([[[-1.5, 0.5]]]),
        cell="elman",
        initial_state=-jnp.ones((1, 1, 1, 2)),
    )
    assert ((np.asarray(h[:, :, 0]).max(-1) > 0) == (np.cumsum(bits, axis=1) % 2 == 1)).all()
