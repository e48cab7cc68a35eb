"""A Transformer with as many parameters as matmul_free.py, to compare with.

Reproduces: no published run. MatMul-free LM (Zhu et al. 2024, arXiv 2406.02528) compares with Transformer++:
attention to all tokens of a row with rotary positions, and a GLU. Optimizer, rates and steps are those of
mlgru.py: nothing was tuned for attention, which learns slowly at first.
Should reach: 2.30 bits per byte on held-out files, where mlgru.py has 1.97 and matmul_free.py 2.17.
Time: four minutes on two cores.

  python -m experiments.train --config=experiments/configs/low_bit/transformer.py
  python -m experiments.train --config=experiments/configs/low_bit/transformer.py:smoke     ends in seconds
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
    config.model.unroll = True
    config.model.pattern = ("attention",)
    config.model.blocks.attention = block(
        mixer="SlidingWindowAttention",
        channel="GLU",
        mixer_args=dict(heads=4, window=512),
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
