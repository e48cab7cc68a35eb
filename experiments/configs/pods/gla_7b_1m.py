"""A 7B gated linear attention model on 256 TPU v6e chips, with rows of a million tokens.

Reproduces: no published run. Each row is split over 64 chips, which exchange states of a layer and no tokens
(LASP-2, Sun et al. 2025, arXiv 2502.07563).
Should reach: no run of it is known here. Its plan is in docs/results/planning.md.
Time: as there.

  python -m experiments.plan --config=experiments/configs/pods/gla_7b_1m.py --topology=v6e:16x16
  python -m experiments.train --config=experiments/configs/pods/gla_7b_1m.py:smoke     in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, defaults, shrink


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds on a CPU."""
    check_variant(variant)
    config = defaults()
    config.steps = 25_000  # of four million tokens
    config.batch_size = 4
    config.data.sequence_length = 1_048_576

    config.model.vocab_size = 32_000
    config.model.width = 4096
    config.model.repeats = 32
    config.model.tie_embeddings = False
    config.model.pattern = ("gla",)
    config.model.blocks.gla = block(
        mixer="GatedLinearAttention", channel="GLU", mixer_args=dict(heads=8), channel_args=dict(expand=2.75)
    )
    config.model.dtype = "bfloat16"
    config.memory.remat = "full"
    config.memory.loss_tiles = 8

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    config.mesh.data = 1
    config.mesh.fsdp = 4
    config.mesh.sequence = 64

    if variant == "smoke":
        shrink(config)
    return config
