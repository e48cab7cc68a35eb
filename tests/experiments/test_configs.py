"""Every config can be built, says what it is for, and its smoke variant runs in seconds."""

import ast
import importlib
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments import train
from experiments.trainer.optimizers import make_optimizer
from experiments.trainer.runs import build_model, shapes_of
from tests.experiments import tiny
from tests.experiments.runs import ROOT, call, finish, start, write_corpus

FILES = sorted((ROOT / "experiments/configs").glob("*/*.py"))
# Language models; the others: test_classify.py, tests/optim.
CONFIGS = {p.stem: p for p in FILES if p.parent.name in ("lm", "low_bit")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_imports_the_defaults_and_no_other_config(file):
    """So that a change of one experiment changes no other."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported |= {"." * node.level + (node.module or "")}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert imported == {"ml_collections", "experiments.configs.defaults"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_it_is_for_and_builds(name):
    file = CONFIGS[name].relative_to(ROOT)
    text = ast.get_docstring(ast.parse(CONFIGS[name].read_text()))
    for word in ("Reproduces:", "Should reach:", "Time:", f"--config={file}:smoke"):
        assert word in text
    get_config = importlib.import_module(".".join(file.with_suffix("").parts)).get_config
    for variant in ("", "smoke"):
        config = get_config(variant)
        config.model.vocab_size = 256
        module = build_model(config)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        jax.eval_shape(make_optimizer(config.optimizer, config.steps).init, shapes)
    with pytest.raises(ValueError, match="'large'; expected nothing or 'smoke'"):
        get_config("large")


def test_params_in_float32_are_the_master_weights_of_a_narrow_model():
    config = tiny.get_config()
    config.model.update(vocab_size=256, dtype="bfloat16")
    module = build_model(config)
    shapes = shapes_of(module, config)
    assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"float32"}
    seen = jax.eval_shape(
        lambda p: module.apply({"params": p}, jnp.zeros((1, 2), jnp.int32), capture_intermediates=True)[1],
        shapes,
    )
    assert any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(seen))


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_a_smoke_variant_runs(name, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    status, output = call(
        train.main,
        f"--config={CONFIGS[name].relative_to(ROOT)}:smoke",
        f"--config.data.path={corpus}",
        f"--run={tmp_path}",
    )
    assert status == 0, output
    assert "12 steps in all" in output
    assert "this model" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config is missing"),
        (["--config=experiments/configs/lm/quickstart.py", "--config.no_such=1"], "got 'no_such'; expected"),
        (
            ["--config=experiments/configs/lm/quickstart.py", "--config.optimizer.options.rank=8"],
            "optimizer.options.rank: got 8; expected an argument of muon, which takes learning_rate",
        ),
        (
            [
                "--config=tests/experiments/tiny.py",
                "--config.optimizer.name=adamw_8bit",
                "--config.optimizer.options.moments.group_size=0",
            ],
            "optimizer.options.moments: group_size: got 0; expected at least 1",
        ),
        (["--config=experiments/configs/lm/quickstart.py:large"], "'large'; expected nothing or 'smoke'"),
        (["--config=experiments/configs/lm/quickstart.py", "lonely"], "'lonely' is no flag"),
    ],
)
def test_the_command_line_explains_itself(arguments, words):
    status, output = call(train.main, *arguments)
    assert status != 0
    assert words in output


def test_help():
    output = finish(start([sys.executable, "-m", "experiments.train", "--help"]), status=1)
    assert "--config=experiments/configs/lm/quickstart.py:smoke" in output
