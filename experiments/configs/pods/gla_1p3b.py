"""A 1.3B gated linear attention model on 256 TPU v5e chips.

Reproduces: the shape and the schedule of the 1.3B model of Yang et al. 2024 (GLA, arXiv 2312.06635), with the
hidden width rounded to what the matrix unit likes: 24 layers of width 2048, 4 heads, rows of 2048 tokens.
Should reach: no run of it is known here. Its plan is in docs/results/planning.md.
Time: as there.

  python -m experiments.plan --config=experiments/configs/pods/gla_1p3b.py --topology=v5e:16x16
  python -m experiments.train --config=experiments/configs/pods/gla_1p3b.py:smoke     in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, defaults, shrink


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds on a CPU."""
    check_variant(variant)
    config = defaults()
    config.steps = 95_000  # of a million tokens
    config.batch_size = 512
    config.data.sequence_length = 2048

    config.model.vocab_size = 32_000
    config.model.width = 2048
    config.model.repeats = 24
    config.model.tie_embeddings = False
    config.model.pattern = ("gla",)
    config.model.blocks.gla = block(
        mixer="GatedLinearAttention", channel="GLU", mixer_args=dict(heads=4), channel_args=dict(expand=2.75)
    )
    config.model.dtype = "bfloat16"
    config.memory.remat = "dots_without_batch"

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    # A part of a matrix in 256 has 8 rows, too few to reduce and scatter gradients: they would travel twice.
    config.mesh.data = 4
    config.mesh.fsdp = 64

    if variant == "smoke":
        shrink(config)
    return config
