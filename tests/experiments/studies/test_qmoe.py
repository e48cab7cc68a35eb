"""The study of experts below one bit: rows of a tiny model say what was stored and lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from experiments.studies import qmoe


@pytest.mark.full
def test_experts_are_packed_each_way():
    block = frugax.layers.Block("MLGRU", "MoE", {}, {"experts": 3, "k": 2, "expand": 1})
    module = frugax.layers.Decoder(vocab_size=256, width=32, blocks=(block,), repeats=2, backend="xla")
    tokens = jax.random.randint(jax.random.key(0), (4, 48), 0, 256)
    params = jax.jit(module.init)(jax.random.key(1), tokens)["params"]
    ones = np.ones((4, 48), np.int32)
    tokens = np.asarray(tokens)
    held_out = [{"tokens": tokens, "targets": tokens, "weights": ones, "bytes": ones, "segment_ids": ones}]
    found = qmoe.compare(
        module, params, [jnp.asarray(tokens), jnp.asarray(tokens[::-1])], held_out, say=lambda text: None
    )
    assert found["expert_weights"] == 2 * 3 * (32 * 64 + 32 * 32)
    none, nearest, mean, gptq = found["rows"]
    assert gptq["output_error"] < 0.9 * nearest["output_error"]
    assert {row["method"] for row in (none, nearest, mean, gptq)} == {
        *("none", "nearest", "nearest, mean magnitude", "gptq")
    }
    for row in (nearest, mean, gptq):
        parts = [row[name] for name in ("codewords", "offsets", "values")]
        assert row["bits_per_weight"] == pytest.approx(sum(parts), abs=2e-4)
        assert row["codewords"] > row["entropy"]
    widths = [64, 32]  # offsets of 32 bits: one for each output and one more
    assert nearest["offsets"] == pytest.approx(32 * sum(n + 1 for n in widths) / (32 * sum(widths)), abs=1e-4)
    assert jnp.isfinite(none["bits_per_byte"])


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"qmoe: .*no checkpoint"):
        qmoe.main([f"--run={tmp_path}"])


def test_the_config_of_the_run_is_whole():
    config = qmoe.get_config()
    assert config.model.width == 512
    assert config.optimizer.name == "adamw"
