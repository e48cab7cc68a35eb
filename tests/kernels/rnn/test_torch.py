"""One head is what PyTorch calls LSTM, GRU and RNN, gates in the same order: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.errors import assert_close

torch = pytest.importorskip("torch")

NAMES = {"lstm": "LSTM", "gru": "GRU", "elman": "RNN"}


@pytest.mark.parametrize("cell", NAMES)
def test_equals_torch(cell):
    B, T, D = 2, 9, 5
    rng = np.random.default_rng(0)
    module = getattr(torch.nn, NAMES[cell])(D, D, batch_first=True, dtype=torch.float64)
    x = torch.tensor(rng.standard_normal((B, T, D)), requires_grad=True)
    state = torch.tensor(rng.standard_normal((2 if cell == "lstm" else 1, 1, B, D)), requires_grad=True)
    out, last = module(x, tuple(state) if cell == "lstm" else state[0])
    last = torch.stack(last) if cell == "lstm" else last[None]
    (out.sin().sum() + (last**2).sum()).backward()
    given = [x, *module.parameters(), state]
    want = [out, last[:, 0]], [a.grad for a in given]

    def loss(x, W, R, bias_x, bias_h, state):
        gates = (x @ W.T + bias_x).reshape(B, T, 1, -1, D)
        recurrent = jnp.moveaxis(R.reshape(-1, D, D), 1, 2)[None]
        h, last = frugax.kernels.rnn(
            gates, recurrent, bias_h.reshape(1, -1, D), cell=cell, initial_state=jnp.moveaxis(state, 2, 0)
        )
        h, last = h[:, :, 0], jnp.moveaxis(last[:, :, 0], 0, 1)
        return jnp.sum(jnp.sin(h)) + jnp.sum(last**2), [h, last]

    with jax.enable_x64(True):
        arrays = [jnp.asarray(a.detach().numpy()) for a in given]
        gradients, values = jax.jit(jax.grad(loss, range(6), has_aux=True))(*arrays)
        want = jax.tree.map(lambda a: a.detach().numpy(), want)
        assert_close((values, list(gradients)), want, "float64")
