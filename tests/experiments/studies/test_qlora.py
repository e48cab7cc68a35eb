"""The study of QLoRA on a tiny model: rows say what was stored and trained."""

import jax
import jax.numpy as jnp
import pytest

from experiments.data import find_corpus, heldout_batches, load_tokenizer, make_loader
from experiments.studies import qlora
from experiments.trainer.runs import build_model
from tests.experiments import tiny
from tests.experiments.runs import write_corpus


def test_bases_are_tuned_beside_each_other(tmp_path):
    config = tiny.get_config()
    config.model.update(vocab_size=256, width=64)
    module = build_model(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    corpus, tokenizer = find_corpus(write_corpus(tmp_path / "corpus"), heldout=0.3), load_tokenizer(None)
    loader = make_loader(corpus, tokenizer, batch_size=2, sequence_length=32, seed=0)
    held_out = heldout_batches(corpus, tokenizer, batch_size=2, sequence_length=32, limit_bytes=200)
    batches = [dict(next(loader)) for _ in range(12)]
    how = {"bases": ("float32", "nf4_dq"), "rank": 2, "rate": 0.05, "paged": True, "say": lambda text: None}
    wide, narrow = qlora.compare(module, params, batches, held_out, **how)
    assert wide["bytes_of_matrices"] == 4 * (64 * 192 + 64 * 64)
    assert 8 * narrow["bytes_of_matrices"] / (64 * 256) == pytest.approx(4.127, abs=0.02)
    for row in (wide, narrow):
        assert row["adapter_parameters"] == 2 * (64 + 192 + 64 + 64)
        assert row["bits_per_byte_after"] < row["bits_per_byte_before"]


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"qlora: .*no checkpoint"):
        qlora.main([f"--run={tmp_path}"])
