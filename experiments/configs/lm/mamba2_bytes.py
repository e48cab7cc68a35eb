"""Mamba-2 on the Python sources of this interpreter, byte by byte.

Reproduces: no published run. The layer is that of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), without a
channel mixer between, as there.
Should reach: 1.73 bits per byte on held-out files, where gzip -9 has 1.75 and the quickstart 1.83.
Time: 20 minutes on one core, evaluation included.

  python -m experiments.train --config=experiments/configs/lm/mamba2_bytes.py
  python -m experiments.train --config=experiments/configs/lm/mamba2_bytes.py:smoke     ends in seconds
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
    config.model.pattern = ("mamba2",)
    config.model.blocks.mamba2 = block(mixer="Mamba2", channel=None, mixer_args=dict(heads=4, state_size=64))

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.012  # of matrices
    config.optimizer.options.adam_learning_rate = 0.004  # of the rest
    config.optimizer.options.ns_steps = 4
    config.optimizer.warmup_steps = 15

    if variant == "smoke":
        shrink(config)
    return config
