"""Selective copying: Mamba, and the same blocks without selection, which can't tell tokens from noise.

Reproduces: Gu and Dao 2023 (Mamba, arXiv 2312.00752), section 4.1.1, far smaller. The rival's steps, input
and output maps are learned constants; its inner width makes up for the parameters that this takes away.
Should reach: 99.9 % of the symbols, and 74 % without selection; chance is 12.5 %.
Time: about two minutes a model on one core.

  python -m experiments.classify --config=experiments/configs/classify/selective_copying.py
  python -m experiments.classify --config=experiments/configs/classify/selective_copying.py:smoke # in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import check_variant, defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    smoke = variant == "smoke"
    counts = dict(train=100, held_out=50) if smoke else dict(train=50_000, held_out=1000)
    task = counts | dict(length=64, copied=8, symbols=8, seed=0)
    config = ConfigDict(
        dict(task="selective_copying", task_args=task, seed=0, batch_size=32, steps=4 if smoke else 1500)
    )
    config.optimizer = defaults().optimizer
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 1 if smoke else 100
    mixers = {"Mamba": dict(state_size=8), "not selective": dict(state_size=8, expand=2.25, selective=False)}
    sizes = dict(width=64, repeats=2, tie_embeddings=False)
    config.models = ConfigDict()
    for name, args in mixers.items():
        block = dict(mixer="Mamba", channel=None, mixer_args=args)
        config.models[name] = dict(kind="Decoder", args=sizes | dict(blocks=[block]))
    return config
