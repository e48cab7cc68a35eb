"""The study of packed decoders: AWQ's folds change nothing, and the whole runs."""

import json

import jax
import numpy as np
import pytest

import frugax
from experiments.studies import low_bit
from experiments.train import main as train
from tests.experiments.runs import call, write_corpus


@pytest.fixture(scope="module")
def decoder():
    """Two layers with outliers in the norms, and statistics of random tokens."""
    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2})
    module = frugax.layers.Decoder(vocab_size=31, width=32, blocks=(block,), repeats=2, backend="xla")
    tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 31)
    params = jax.jit(module.init)(jax.random.key(1), tokens)["params"]
    norms = params["layers"]["block_0"]
    for name in ("mixer_norm", "channel_norm"):
        norms[name]["weight"] = norms[name]["weight"].at[:, 3].set(20.0)
    return module, params, tokens, frugax.quant.calibrate(module, {"params": params}, [tokens])


def test_folded_scales_leave_the_function_as_it_was(decoder):
    module, params, tokens, statistics = decoder
    folded, after = low_bit.fold_awq(params, statistics, "int3", 16)
    logits = jax.jit(lambda p: module.apply({"params": p}, tokens)[0])
    np.testing.assert_allclose(logits(folded), logits(params), atol=1e-4)
    changed = [k for k in statistics if np.abs(after[k].total_abs / statistics[k].total_abs - 1).max() > 0.01]
    assert {path.split("/")[-2] for path in changed} == {"qkv_gates", "gate_in", "out"}
    assert not any("mixer/out" in path for path in changed)


@pytest.mark.parametrize(
    "method",
    [low_bit.nearest, *(pytest.param(f, marks=pytest.mark.full) for f in (low_bit.gptq, low_bit.awq))],
)
def test_methods_pack_every_matrix(decoder, method):
    """And GPTQ's outputs are nearer than those of the nearest codes."""
    module, params, tokens, statistics = decoder
    packed = method(params, statistics, "int3", 16)
    paths = jax.tree_util.tree_leaves_with_path(
        packed, is_leaf=lambda x: isinstance(x, frugax.formats.QuantizedTensor)
    )
    names = [jax.tree_util.keystr(path) for path, x in paths if isinstance(x, frugax.formats.QuantizedTensor)]
    assert len(names) == len(statistics) + 1
    if method is low_bit.gptq:
        plain = low_bit.nearest(params, statistics, "int3", 16)
        errors = [low_bit.mean_output_error(params, p, statistics) for p in (packed, plain)]
        assert errors[0] < 0.9 * errors[1]
    logits = jax.jit(lambda p: module.apply({"params": p}, tokens)[0])(packed)
    assert np.isfinite(logits).all()


@pytest.mark.full
def test_the_whole_study(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    run = tmp_path / "run"
    config = "--config=experiments/configs/lm/quickstart.py:smoke"
    fields = {"data.path": corpus, "data.held_out": 0.3, "tensorboard": False}
    status, output = call(train, config, f"--run={run}", *(f"--config.{k}={v}" for k, v in fields.items()))
    assert status == 0, output
    out, picture = tmp_path / "out.json", tmp_path / "plot.png"
    command = f"--run={run} --formats int4 nvfp4 --batches=1 --decode=4 --out={out} --plot={picture}"
    low_bit.main(command.split())
    result = json.loads(out.read_text())
    assert [(r["format"], r["method"]) for r in result["rows"]] == [
        ("bfloat16", "none"),
        *((f, m) for f in ("int4", "nvfp4") for m in low_bit.METHODS),
    ]
    assert all(0 < r["held_out_bits_per_byte"] < 9 for r in result["rows"])
    assert all(r["bytes"] < result["rows"][0]["bytes"] for r in result["rows"][1:])
    assert all(speed > 0 for speed in result["decoded_tokens_per_second"].values())
    assert picture.stat().st_size > 1000
    low_bit.main(command.replace("int4 nvfp4", "int3 --methods nearest").split())
    more = json.loads(out.read_text())["rows"]
    assert more[:-1] == result["rows"]
    assert (more[-1]["format"], more[-1]["method"]) == ("int3", "nearest")
    with pytest.raises(SystemExit, match="got rows of calibration_tokens"):
        low_bit.main(command.replace("batches=1", "batches=2").split())


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"run: got .*no checkpoints"):
        low_bit.main([f"--run={tmp_path}"])
