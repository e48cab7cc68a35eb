"""Every config can be built, says what it is for, and its smoke variant runs in seconds."""

import ast
import importlib
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

from experiments import train
from experiments.trainer.optimizers import make_optimizer, matrices, schedule
from experiments.trainer.runs import build_model
from tests.experiments.runs import ROOT, call, finish, start, tiny_config, write_corpus

FILES = sorted((ROOT / "experiments/configs").glob("*/*.py"))
CONFIGS = [p.stem for p in FILES if p.parent.name == "lm"]  # the others: test_classify.py, tests/optim


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
    file = ROOT / f"experiments/configs/lm/{name}.py"
    text = ast.get_docstring(ast.parse(file.read_text()))
    for word in ("Reproduces:", "Should reach:", "Time:", f"--config=experiments/configs/lm/{name}.py:smoke"):
        assert word in text
    get_config = importlib.import_module(f"experiments.configs.lm.{name}").get_config
    for variant in ("", "smoke"):
        config = get_config(variant)
        config.model.vocab_size = 256
        module = build_model(config)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        jax.eval_shape(make_optimizer(config.optimizer, config.steps).init, shapes)
    with pytest.raises(ValueError, match="'large'; expected nothing or 'smoke'"):
        get_config("large")


@pytest.mark.parametrize(
    "name", [name if name == "quickstart" else pytest.param(name, marks=pytest.mark.full) for name in CONFIGS]
)
def test_a_smoke_variant_runs(name, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    status, output = call(
        train.main,
        f"--config=experiments/configs/lm/{name}.py:smoke",
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
            "optimizer.options: muon takes no rank; expected learning_rate, ns_coeffs",
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


PARAMS = {
    "embedding": jnp.ones((5, 4)),
    "layers": {
        "mixer": {"kernel": jnp.ones((2, 4, 6)), "bias": jnp.ones((2, 6)), "conv": jnp.ones((2, 3, 4))}
    },
    "norm": {"weight": jnp.ones(4)},
}


def optimizer_config(**fields):
    config = tiny_config("corpus", "run").optimizer
    config.update(fields)
    return config


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    optimizer = make_optimizer(
        optimizer_config(name=name, warmup_steps=0, learning_rate=0.1, weight_decay=0.5), 10
    )
    gradient = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    expected = jax.tree.map(lambda matrix, x: -0.05 * x if matrix else 0 * x, matrices(PARAMS), PARAMS)
    assert matrices(PARAMS)["layers"]["mixer"] == {"kernel": True, "bias": False, "conv": False}
    jax.tree.map(
        lambda a, b: jnp.allclose(a, b, atol=1e-6) or pytest.fail(f"{a} is not {b}"), updates, expected
    )


def test_muon_takes_each_layer_of_a_stack_by_itself():
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), PARAMS)
    config = optimizer_config(name="muon", warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    for layer in range(2):
        one = {"kernel": PARAMS["layers"]["mixer"]["kernel"][layer]}
        of_one, _ = optimizer.update(
            {"kernel": gradient["layers"]["mixer"]["kernel"][layer]}, optimizer.init(one), one
        )
        kernel = updates["layers"]["mixer"]["kernel"][layer]
        assert jnp.allclose(kernel, of_one["kernel"], rtol=1e-4)
        # Five Newton-Schulz steps bring every singular value near 1, times the learning rate and its scale.
        values = jnp.linalg.svd(kernel, compute_uv=False) / (config.learning_rate * 0.2 * 6**0.5)
        assert jnp.all((values > 0.5) & (values < 1.5))


def test_the_schedule_warms_up_and_ends_at_its_fraction():
    rate = schedule(optimizer_config(warmup_steps=4, learning_rate=1.0, final_fraction=0.1), 20)
    assert float(rate(0)) == pytest.approx(1 / 4)
    assert float(rate(4)) == pytest.approx(1.0)
    assert float(rate(12)) == pytest.approx(0.55)
    assert float(rate(20)) == pytest.approx(0.1)


def test_an_option_that_an_optimizer_does_not_take_is_named():
    with pytest.raises(ValueError, match=r"adamw takes no ns_steps; .*b1"):
        make_optimizer(optimizer_config(options=ConfigDict({"ns_steps": 3})), 10)


def test_clipping_bounds_the_gradient():
    config = optimizer_config(name="sgd", warmup_steps=0, learning_rate=1.0, weight_decay=0.0, clip_norm=0.5)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5)
