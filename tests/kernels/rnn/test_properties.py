"""Properties of any recurrent network with heads, whatever the backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.kernels.rnn.cells import CELLS as CELL_DEFINITIONS
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS

from . import definition

ROW = OPERATIONS["rnn"]
every_cell = pytest.mark.parametrize("cell", definition.CELLS)


def arrays(**case):
    """Return the arrays of a case."""
    return {n: jnp.asarray(x) for n, x in ROW.arguments(case).items() if n != "cell"}


@every_cell
def test_pullbacks_are_the_steps_derivatives(cell):
    """By hand in the kernels, by JAX here; the sLSTM before its first token, too."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        given = CELL_DEFINITIONS[cell]
        pre, reads, dstates = (
            tuple(jnp.asarray(rng.standard_normal((n, 9))))
            for n in (given.pre_activations, len(given.reads), len(given.states))
        )
        if cell == "slstm":
            reads = reads[0], (1 + jnp.abs(reads[1])).at[0].set(0), reads[2]
        _, pullback = jax.vjp(given.step, pre, reads)
        assert_close(given.pullback(pre, reads, dstates), pullback(dstates), "float64")


@every_cell
def test_heads_are_the_blocks_of_one_matrix(cell):
    x = arrays(cell=cell, B=2, T=9, H=3, D=4, state=True)
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
    a = ROW.arguments({"cell": "slstm", "B": 2, "T": 10, "H": 1, "D": 3, "dtype": "float64"})
    h = np.zeros((2, 3))
    c, n, out = np.zeros((2, 3)), np.zeros((2, 3)), []
    for t in range(10):
        y = [a["gates"][:, t, 0, g] + h @ a["recurrent"][0, g] + a["bias"][0, g] for g in range(4)]
        c = definition.sigmoid(y[1]) * c + np.exp(y[0]) * np.tanh(y[2])
        n = definition.sigmoid(y[1]) * n + np.exp(y[0])
        h = definition.sigmoid(y[3]) * c / n
        out.append(h)
    with jax.enable_x64(True):
        got, state = frugax.kernels.rnn(**{n: jnp.asarray(x) if n != "cell" else x for n, x in a.items()})
        assert_close(got[:, :, 0], np.stack(out, 1), "float64")
        assert_close(state[:, 2, 0] * jnp.exp(state[:, 3, 0]), n, "float64")
    assert (np.asarray(state[:, 2]) >= 1).all()


@pytest.mark.parametrize("strength", [1e2, 1e4])
@every_cell
def test_strong_gates_stay_finite(cell, strength):
    x = arrays(cell=cell, B=1, T=30, H=1, D=4, packed=True)
    ids = x.pop("segment_ids")
    x["gates"] = x["gates"] * strength

    def loss(x):
        h, state = frugax.kernels.rnn(**x, segment_ids=ids, cell=cell, backend="xla")
        return jnp.sum(h**2) + jnp.sum(jnp.sin(state)), h

    gradient, h = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert jnp.isfinite(h).all()
    assert h.any()
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


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
        steep / 2 * jnp.array([[[[-1.0, 1.0]] * 2]], jnp.float32),
        steep * jnp.array([[[-1.5, 0.5]]], jnp.float32),
        cell="elman",
        initial_state=-jnp.ones((1, 1, 1, 2), jnp.float32),
    )
    assert ((np.asarray(h[:, :, 0]).max(-1) > 0) == (np.cumsum(bits, axis=1) % 2 == 1)).all()
