"""A language model without matrix products: ternary weights, 8-bit activations, elementwise recurrences.

Reproduces: on the scale of a CPU, MatMul-free LM (Zhu et al. 2024, arXiv 2406.02528): every matrix of MLGRU,
of the GLU and of the head is a BitLinear, trained straight through. mlgru.py is the same model
with float32 matrices, transformer.py one with attention.
Should reach: 2.17 bits per byte on held-out files, where mlgru.py has 1.97 and transformer.py 2.30; packed,
its matrices take a sixteenth of the bytes, and the logits are the same.
Time: two minutes on two cores.

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

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.012  # of matrices
    config.optimizer.options.adam_learning_rate = 0.004  # of the rest
    config.optimizer.options.ns_steps = 4
    config.optimizer.warmup_steps = 15

    if variant == "smoke":
        shrink(config)
    return config
