"""Gated linear attention on the Python sources of this interpreter: five minutes on two CPU cores.

Reproduces: no published run; it shows the path from the equation to a model that writes text, byte by byte.
The layer is that of Gated Linear Attention Transformers (Yang et al. 2024, arXiv 2312.06635).
Should reach: about 1.83 bits per byte on held-out files, where an order-3 byte model needs 2.04 and gzip -9,
which sees the file it compresses, 1.75.
Time: under five minutes on two cores, with compilation, evaluation and a sample.

  python -m experiments.train --config=experiments/configs/lm/quickstart.py
  python -m experiments.train --config=experiments/configs/lm/quickstart.py:smoke     ends in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, defaults, shrink


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    config = defaults()
    config.steps = 1250
    config.batch_size = 4
    config.data.sequence_length = 512

    config.model.width = 128
    config.model.repeats = 4
    config.model.tie_embeddings = False
    config.model.unroll = True
    config.model.pattern = ("gla",)
    config.model.blocks.gla = block(
        mixer="GatedLinearAttention",
        channel="GLU",
        mixer_args=dict(heads=2, conv_width=4),
        channel_args=dict(expand=2.0),
    )

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.012  # of matrices
    config.optimizer.options.adam_learning_rate = 0.004  # of the rest
    config.optimizer.options.ns_steps = 4
    config.optimizer.warmup_steps = 15

    if variant == "smoke":
        shrink(config)
    return config
