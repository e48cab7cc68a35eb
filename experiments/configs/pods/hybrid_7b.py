"""A 7B hybrid of Mamba-2 and windowed attention on a v5p-512 (256 chips), with rows of 32,768 tokens.

Reproduces: no published run. Seven layers of eight are Mamba-2 (Dao and Gu 2024, arXiv 2405.21060), one is
softmax attention over the last 2048 tokens, as in Samba (Ren et al. 2024, arXiv 2406.07522).
Should reach: no run of it is known here. Its plan is in docs/results/planning.md.
Time: as there.

  python -m experiments.plan --config=experiments/configs/pods/hybrid_7b.py --topology=v5p:4x8x8
  python -m experiments.train --config=experiments/configs/pods/hybrid_7b.py:smoke     in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, defaults, shrink


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds on a CPU."""
    check_variant(variant)
    config = defaults()
    config.steps = 120_000  # of four million tokens
    config.batch_size = 128
    config.data.sequence_length = 32_768

    config.model.vocab_size = 32_000
    config.model.width = 4096
    config.model.repeats = 4
    config.model.tie_embeddings = False
    config.model.pattern = ("mamba2",) * 7 + ("attention",)
    config.model.blocks.mamba2 = block(
        mixer="Mamba2", channel="GLU", mixer_args=dict(heads=128), channel_args=dict(expand=2.0)
    )
    config.model.blocks.attention = block(
        mixer="SlidingWindowAttention",
        channel="GLU",
        mixer_args=dict(heads=32, window=2048),
        channel_args=dict(expand=2.0),
    )
    config.model.dtype = "bfloat16"
    config.memory.remat = "full"
    config.memory.loss_tiles = 8

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000
    config.mesh.data = 1
    config.mesh.fsdp = 128
    config.mesh.sequence = 2

    if variant == "smoke":
        shrink(config)
        config.model.blocks.mamba2.mixer_args.heads = 4
        config.model.blocks.attention.mixer_args = dict(heads=4, window=16)
    return config
