"""A language model without matrix products: ternary weights, 8-bit activations, elementwise recurrences.

Reproduces: on the scale of a CPU, MatMul-free LM (Zhu et al. 2024, arXiv 2406.02528): every matrix of MLGRU,
of the GLU and of the head is a BitLinear, trained straight through. mlgru.py is the same model
with float32 matrices.
Should reach: about 2.5 bits per byte on held-out files; packed, its matrices take a sixteenth of the bytes.
Time: three minutes on two cores.

  python -m experiments.train --config=experiments/configs/low_bit/matmul_free.py
  python -m experiments.train --config=experiments/configs/low_bit/matmul_free.py:smoke     ends in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, defaults, shrink


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    config = defaults()
    config.steps = 800
    config.batch_size = 4
    config.data.sequence_length = 512

    config.model.width = 128
    config.model.repeats = 2
    config.model.tie_embeddings = False
    config.model.ternary_head = True
    config.model.unroll = True
    config.model.pattern = ("mlgru",)
    config.model.blocks.mlgru = block(
        mixer="MLGRU",
        channel="GLU",
        mixer_args=dict(ternary=True),
        channel_args=dict(expand=2.0, ternary=True),
    )

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 0.01  # ternary weights move where their float32 ones have moved far
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 40

    if variant == "smoke":
        shrink(config)
    return config
