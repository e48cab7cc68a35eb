"""The frame of training benchmarks: a config's corpus, model and compiled step, without checkpoints."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from experiments.data import find_corpus, load_tokenizer, make_loader
from experiments.trainer.optimizers import make_optimizer
from experiments.trainer.runs import build_model
from experiments.trainer.state import init_state, make_train_step


class Training(NamedTuple):
    """Training about to begin: `state, metrics = step(state, dict(next(batches)))`, the state given away."""

    tokenizer: Any
    corpus: Any
    batches: Iterator[Any]
    module: nn.Module
    state: Any
    step: Any


def prepare(config: ConfigDict) -> Training:
    """Build what `config` says, compiled for its first batch, which is taken from the batches."""
    tokenizer = load_tokenizer(config.data.tokenizer or None)
    config.model.vocab_size = tokenizer.vocab_size
    corpus = find_corpus(config.data.path or None, heldout=config.data.held_out)
    batches = make_loader(
        corpus,
        tokenizer,
        batch_size=config.batch_size,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
    )
    module, optimizer = build_model(config), make_optimizer(config.optimizer, config.steps)
    state = jax.jit(lambda: init_state(module, optimizer, config.seed, 0.0))()
    step = make_train_step(module, optimizer, accumulate=1, ema_decay=0.0)
    compiled = jax.jit(step, donate_argnums=0).lower(state, dict(next(batches))).compile()
    return Training(tokenizer, corpus, batches, module, state, compiled)
