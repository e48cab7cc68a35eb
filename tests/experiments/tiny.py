"""A model that compiles and steps as fast as one can: for tests of everything around it."""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, defaults, shrink


def get_config() -> ConfigDict:
    """A recurrence of 16 channels on 32 bytes."""
    config = defaults()
    config.model.pattern = ("gru",)
    config.model.blocks.gru = block(mixer="MLGRU", channel=None)
    config.optimizer.learning_rate = 0.02
    shrink(config)
    config.tensorboard = False
    config.model.width = 16
    config.model.backend = "xla"  # nothing else to trace
    config.model.tie_embeddings = False
    config.data.sequence_length = 32
    config.data.held_out = 0.3
    config.evaluation.sequence_length = 32
    config.evaluation.max_bytes = 1024
    config.sample.tokens = 2
    return config
