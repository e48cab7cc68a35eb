"""The config of each optimizer builds, and says what it takes."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.optimizers_quality import RESULTS
from experiments.configs.optimizers.llama_1m import OPTIMIZERS, get_config
from experiments.trainer.optimizers import make_optimizer
from experiments.trainer.runs import build_model


@pytest.mark.parametrize(
    "names", [["adamw", "galore"], pytest.param(list(OPTIMIZERS), marks=pytest.mark.full)]
)
def test_optimizers_take_the_model(names):
    for name in dict.fromkeys(["adamw", *names]):
        config = get_config(name)
        config.model.vocab_size = 256
        if name == "adamw":
            init = build_model(config).init
            shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
            assert 0.9e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 1.2e6
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = jax.eval_shape(optimizer.init, shapes)
        jax.eval_shape(optimizer.update, shapes, state, shapes)
        assert get_config(f"{name},smoke").steps < 20


def test_every_optimizer_comes_with_the_best_rate_that_was_tried_and_it_is_inside_its_grid():
    runs = json.loads(RESULTS.read_text())["runs"]
    for name, (_, _, rates) in OPTIMIZERS.items():
        tried = {float(rate): run["held_out_bits_per_byte"] for rate, run in runs[name].items()}
        assert sorted(tried) == sorted(rates), name
        assert min(tried, key=tried.get) == rates[1] == get_config(name).optimizer.learning_rate, name


@pytest.mark.parametrize("variant", ["sgd", "galore,large", ""])
def test_unknown_variants(variant):
    with pytest.raises(ValueError, match="one of adamw, "):
        get_config(variant)
