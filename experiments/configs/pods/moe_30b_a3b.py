"""A mixture of experts with 30B params, 3B of them active, on a v5p-1024 (512 chips).

Reproduces: the shape of Qwen3-30B-A3B (arXiv 2505.09388) but for the mixer, which is gated linear attention
here: 48 layers of width 2048, each with 128 experts of width 768, of which a token reads 8.
Should reach: no run of it is known here. Its plan is in docs/results/planning.md.
Time: as there.

  python -m experiments.plan --config=experiments/configs/pods/moe_30b_a3b.py --topology=v5p:8x8x8
  python -m experiments.train --config=experiments/configs/pods/moe_30b_a3b.py:smoke     in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, defaults, shrink


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds on a CPU."""
    check_variant(variant)
    config = defaults()
    config.steps = 500_000  # of two million tokens
    config.batch_size = 512
    config.data.sequence_length = 4096

    config.model.vocab_size = 151_936
    config.model.width = 2048
    config.model.repeats = 48
    config.model.tie_embeddings = False
    config.model.pattern = ("moe",)
    config.model.blocks.moe = block(
        mixer="GatedLinearAttention",
        channel="MoE",
        mixer_args=dict(heads=8),
        channel_args=dict(experts=128, k=8, expand=0.375, expert_axis="expert"),
    )
    config.model.dtype = "bfloat16"
    config.memory.remat = "full"
    config.memory.loss_tiles = 4

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2000
    config.mesh.data = 1
    config.mesh.fsdp = 64
    config.mesh.expert = 8

    if variant == "smoke":
        shrink(config)
        config.model.blocks.moe.channel_args.experts = 8
        config.model.blocks.moe.channel_args.k = 2
    return config
