"""Mamba-2 with a layer of sliding-window attention after every three, on this interpreter's Python sources.

Reproduces: no published run. A few attention layers among Mamba-2's is what its paper (Dao and Gu 2024, arXiv
2405.21060) found better than either alone; there attention sees all that came before, here the last 128
bytes, so that the state stays of one size.
Should reach: about 1.65 bits per byte on held-out files, where mamba2_bytes.py needs 1.73 and gzip -9 1.75.
Time: 20 minutes on one CPU core.

  python -m experiments.train --config=experiments/configs/lm/hybrid_bytes.py
  python -m experiments.train --config=experiments/configs/lm/hybrid_bytes.py:smoke     ends in seconds
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
    config.model.repeats = 2
    config.model.tie_embeddings = False
    config.model.unroll = True
    config.model.pattern = ("mamba2", "mamba2", "mamba2", "window")
    config.model.blocks.mamba2 = block(mixer="Mamba2", channel=None, mixer_args=dict(heads=4, state_size=64))
    config.model.blocks.window = block(
        mixer="SlidingWindowAttention", channel=None, mixer_args=dict(heads=4, window=128)
    )

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.012  # of matrices
    config.optimizer.options.adam_learning_rate = 0.004  # of the rest
    config.optimizer.options.ns_steps = 4
    config.optimizer.warmup_steps = 15

    if variant == "smoke":
        shrink(config)
    return config
