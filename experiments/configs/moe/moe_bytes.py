"""A mixture of experts beside the dense model of equal active parameters, dense_bytes.py.

Reproduces: on the scale of a CPU, what sparse models promise since Switch Transformer (Fedus et al. 2021,
arXiv 2101.03961): more parameters at the same work a token give a lower loss. Eight experts of a layer take
the place of one GLU; a token reads two, together as wide as the GLU.
Should reach: 1.84 bits per byte on held-out files, where dense_bytes.py has 1.91.
Time: a few minutes on two cores.

  python -m experiments.train --config=experiments/configs/moe/moe_bytes.py
  python -m experiments.train --config=experiments/configs/moe/moe_bytes.py:smoke     ends in seconds
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
    config.model.pattern = ("moe",)
    config.model.blocks.moe = block(
        mixer="MLGRU", channel="MoE", channel_args=dict(experts=8, k=2, expand=1.0)
    )

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.012  # of matrices, each expert's by itself
    config.optimizer.options.adam_learning_rate = 0.004  # of the rest
    config.optimizer.options.ns_steps = 4
    config.optimizer.warmup_steps = 15

    if variant == "smoke":
        shrink(config)
    return config
