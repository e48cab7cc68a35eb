"""The study of refactoring: experts are the masked model, neurons by lot are as many, and it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import read_me as study
from tests.errors import assert_close

TOKENS = np.random.default_rng(0).integers(256, size=(2, 9)).astype(np.int32)


def subsets():
    """Masks of two layers and four experts: half of the neurons each, some of them in all four."""
    rng = np.random.default_rng(1)
    found = np.zeros((2, 4, study.HIDDEN), bool)
    for layer in found:
        shared = rng.permutation(study.HIDDEN)
        layer[:, shared[:40]] = True
        for expert in layer:
            expert[rng.choice(shared[40:], study.HIDDEN // 2 - 40, replace=False)] = True
    return found


def test_neurons_by_lot_are_as_many_and_overlap_as_much():
    given, drawn = subsets(), study.by_lot(subsets(), 0)
    assert (given != drawn).any()
    overlaps = [np.einsum("leh,lfh->lef", s.astype(int), s.astype(int)) for s in (given, drawn)]
    np.testing.assert_array_equal(*overlaps)


@pytest.mark.full
def test_layers_of_experts_are_the_masked_model():
    params = jax.jit(study.Model().init)(jax.random.key(0), TOKENS)["params"]
    choice = jnp.asarray(np.random.default_rng(2).integers(4, size=TOKENS.shape))
    model, split = study.refactored(params, subsets())
    masks = jnp.asarray(subsets(), jnp.float32)
    want = jax.jit(lambda p: study.Model().apply({"params": p}, TOKENS, masks, choice)[0])(params)
    got = jax.jit(lambda p: model.apply({"params": p}, TOKENS, None, choice)[0])(split)
    assert_close(got, want, "float32")
    whole = jax.jit(lambda p: study.Model().apply({"params": p}, TOKENS)[0])(params)
    assert np.abs(np.asarray(whole - want)).max() > 1e-3


@pytest.mark.full
def test_it_runs(capsys, tmp_path):
    study.main(["--smoke", "--out", str(tmp_path / "no.json")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("dense, tuned", "by activation, tuned", "random neurons, tuned"))
    assert not list(tmp_path.iterdir())
