"""GaLore against its authors' implementation for torch (galore-torch, Apache-2.0), of the `parity` extra."""

import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax import optim
from tests.errors import assert_close
from tests.optim.optimizers import gradients

STEPS, EVERY = 40, 8


@pytest.fixture
def galore_torch(monkeypatch):
    """The package without its __init__, which asks for bitsandbytes and CUDA."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = importlib.util.find_spec("galore_torch")
    if found is None:
        pytest.skip("galore-torch is not installed")
    package = types.ModuleType("galore_torch")
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    modules = [importlib.import_module(f"galore_torch.{name}") for name in ("adamw", "galore_projector")]
    yield modules
    for name in ("adamw", "galore_projector"):
        sys.modules.pop(f"galore_torch.{name}", None)


def theirs(modules, w, g):
    """Weights after each step, at scale 0.25, with the signs of singular vectors that ours takes."""
    import torch

    adamw, projector = modules
    free = projector.GaLoreProjector.get_orthogonal_matrix

    class Signed(projector.GaLoreProjector):
        """LAPACK's signs are arbitrary, and mean something to moments that live on: the nearer ones here."""

        def get_orthogonal_matrix(self, weights, rank, type):
            new, axis = free(self, weights, rank, type), 1 if type == "right" else 0
            if self.ortho_matrix is None:
                return new
            flipped = (new * self.ortho_matrix).sum(axis, keepdim=True) < 0
            return torch.where(flipped, -new, new)

    adamw.GaLoreProjector = Signed
    leaf = torch.nn.Parameter(torch.tensor(w, dtype=torch.float32))
    group = {"params": [leaf], "rank": 3, "update_proj_gap": EVERY, "scale": 0.25, "proj_type": "std"}
    opt = adamw.AdamW([group], lr=0.1, eps=0.0, weight_decay=0.1, no_deprecation_warning=True)
    path = []
    for gradient in g:
        leaf.grad = torch.tensor(gradient, dtype=torch.float32)
        opt.step()
        path.append(leaf.detach().numpy().copy())
    return np.stack(path)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_the_authors_weights(galore_torch, shape):
    """eps is 0: theirs adds it before the bias correction of the second moment, ours after it."""
    w = np.random.default_rng(1).normal(size=shape)
    g = gradients(shape, STEPS)
    opt = optim.galore(0.1, rank=3, update_interval=EVERY, projector="svd", eps=0.0)

    def step(carry, gradient):
        params, state = carry
        updates, state = opt.update({"kernel": gradient}, state, params)
        params = jax.tree.map(lambda w, u: (w + u) * (1 - 0.1 * 0.1), params, updates)  # theirs decays last
        return (params, state), params["kernel"]

    start = {"kernel": jnp.asarray(w, jnp.float32)}
    ours = jax.jit(lambda g: jax.lax.scan(step, (start, opt.init(start)), g)[1])(jnp.asarray(g, jnp.float32))
    # A singular vector is as exact as float32 over the gap of its value to the next, here a tenth at least.
    assert_close(ours, theirs(galore_torch, w, g), "float32", times=10)
