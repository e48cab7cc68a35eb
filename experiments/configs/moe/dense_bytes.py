"""The dense model beside moe_bytes.py: one GLU a layer, as wide as the experts that a token reads there.

Reproduces: nothing published; it is the other row of moe_bytes.py.
Should reach: 1.91 bits per byte on held-out files, where moe_bytes.py has 1.84.
Time: two minutes on two cores.

  python -m experiments.train --config=experiments/configs/moe/dense_bytes.py
  python -m experiments.train --config=experiments/configs/moe/dense_bytes.py:smoke     ends in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, defaults, shrink


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    config = defaults()
    config.steps = 1000
    config.batch_size = 4
    config.data.sequence_length = 512

    config.model.width = 128
    config.model.repeats = 2
    config.model.tie_embeddings = False
    config.model.unroll = True
    config.model.pattern = ("dense",)
    config.model.blocks.dense = block(mixer="MLGRU", channel="GLU", channel_args=dict(expand=2.0))

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.012  # of matrices
    config.optimizer.options.adam_learning_rate = 0.004  # of the rest
    config.optimizer.options.ns_steps = 4
    config.optimizer.warmup_steps = 15

    if variant == "smoke":
        shrink(config)
    return config
