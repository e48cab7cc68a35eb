"""The config of each optimizer builds, and says what it takes."""

import jax
import jax.numpy as jnp
import pytest

from experiments.configs.optimizers.llama_1m import OPTIMIZERS, get_config
from experiments.optimizers import make_optimizer
from experiments.runs import build_model


def test_every_optimizer_takes_the_model():
    for name in OPTIMIZERS:
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


@pytest.mark.parametrize("variant", ["sgd", "galore,large", ""])
def test_unknown_variants(variant):
    with pytest.raises(ValueError, match="one of adamw, "):
        get_config(variant)
