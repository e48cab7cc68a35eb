"""FlashRNN's own: its formula, its initial values, what can't be right. (test_mixers.py has the rest.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close
from tests.kernels.rnn import definition

from .mixers import whole


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=pytest.mark.xdist_group(f"mixer FlashRNN-{cell}"))
        for cell in ("lstm", "slstm")
    ],
)
def test_is_projections_around_the_definition(cell):
    p, x, y, state = whole(f"FlashRNN-{cell}")
    B, T, W = x.shape
    gates = (x @ p["gates"]["kernel"]).reshape(B, T, 2, 4, W // 2)
    start = np.zeros((B, definition.CELLS[cell][2], 2, W // 2))
    h, want_state = definition.rnn(gates, p["recurrent"], p["bias"], start, cell)
    h = h - h.mean(-1, keepdims=True)
    h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 64e-5) * p["norm"]["weight"] + p["norm"]["bias"]
    assert_close(y, h.reshape(B, T, W) @ p["out"]["kernel"], "float64")
    assert_close(state.memory, want_state, "float64")


def born(width, **more):
    """Return the initial parameters of a layer of two heads."""
    layer = frugax.layers.FlashRNN(heads=2, **more)
    return jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 2, width)))["params"]


def test_forget_gates_start_open():
    bias = np.asarray(born(8)["bias"])
    assert bias[:, 1].tolist() == [[3.0, 4.0, 5.0, 6.0]] * 2
    assert not bias[:, [0, 2, 3]].any()
    assert not np.asarray(born(8, cell="gru")["bias"]).any()


def test_recurrent_matrices_start_with_unit_gain():
    recurrent = np.asarray(born(128)["recurrent"])
    gain = np.sqrt(np.sum(recurrent**2, axis=2))  # of each gate's channels, over its 64 inputs
    assert gain.shape == (2, 4, 64)
    np.testing.assert_allclose(gain.mean((0, 2)), 1, atol=0.03)  # four deviations of 8,192 draws


def test_a_cell_that_is_none(unchecked_types):
    with pytest.raises(ValueError, match="cell: got 'rwkv'; expected one of 'lstm'"):
        frugax.layers.FlashRNN(cell="rwkv").init(jax.random.key(0), jnp.ones((1, 2, 8)))
