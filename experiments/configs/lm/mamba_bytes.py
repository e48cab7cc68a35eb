"""Mamba on the Python sources of this interpreter, byte by byte.

Reproduces: no published run. The layer is that of Mamba (Gu and Dao 2023, arXiv 2312.00752), without a
channel mixer between, as there.
Should reach: about 1.72 bits per byte on held-out files, where the quickstart needs 1.83 and gzip -9 1.75.
Time: 27 minutes on one CPU core.

  python -m experiments.train --config=experiments/configs/lm/mamba_bytes.py
  python -m experiments.train --config=experiments/configs/lm/mamba_bytes.py:smoke     ends in seconds
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
    config.model.repeats = 8
    config.model.tie_embeddings = False
    config.model.unroll = True
    config.model.pattern = ("mamba",)
    config.model.blocks.mamba = block(mixer="Mamba", channel=None, mixer_args=dict(state_size=16))

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.012  # of matrices
    config.optimizer.options.adam_learning_rate = 0.004  # of the rest
    config.optimizer.options.ns_steps = 4
    config.optimizer.warmup_steps = 15

    if variant == "smoke":
        shrink(config)
    return config
