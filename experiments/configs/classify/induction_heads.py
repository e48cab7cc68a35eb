"""Induction heads: Mamba, and the same blocks without selection, which can't look a token up.

Reproduces: Gu and Dao 2023 (Mamba, arXiv 2312.00752), section 4.1.2, far smaller; also tested at lengths
never trained at. The rival's steps, input and output maps are learned constants; its inner width makes up for
the parameters that this takes away.
Should reach: 100 % for both at the trained length of 32; at 128, 100 % and 14 %; at 1024, 55 % and 6 %, which
is chance.
Time: under a minute a model on one core.

  python -m experiments.classify --config=experiments/configs/classify/induction_heads.py
  python -m experiments.classify --config=experiments/configs/classify/induction_heads.py:smoke  # in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import check_variant, defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    smoke = variant == "smoke"
    counts = dict(train=100, held_out=50) if smoke else dict(train=100_000, held_out=500)
    task = counts | dict(length=32, symbols=16, seed=0, longer=(64,) if smoke else (64, 128, 256, 512, 1024))
    config = ConfigDict(
        dict(task="induction_heads", task_args=task, seed=0, batch_size=64, steps=4 if smoke else 1500)
    )
    config.optimizer = defaults().optimizer
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 1 if smoke else 100
    mixers = {"Mamba": dict(state_size=8), "not selective": dict(state_size=8, expand=2.375, selective=False)}
    sizes = dict(width=32, repeats=2, tie_embeddings=False)
    config.models = ConfigDict()
    for name, args in mixers.items():
        block = dict(mixer="Mamba", channel=None, mixer_args=args)
        config.models[name] = dict(kind="Decoder", args=sizes | dict(blocks=[block]))
    return config
