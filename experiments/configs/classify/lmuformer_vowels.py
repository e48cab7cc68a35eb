"""LMUFormer and its spiking variant on real speech: who of nine said a vowel.

Reproduces: no published run; the model is that of Liu et al. 2024 (arXiv 2402.04882), causal, small.
Should reach: about 95 % (spiking 91, sliding-window attention 94; nearest neighbour 92). Logistic regression
on all frames of an utterance at once reaches 98: 270 utterances are few.
Time: a minute on one core, for all three.

  python -m experiments.classify --config=experiments/configs/classify/lmuformer_vowels.py
  python -m experiments.classify --config=experiments/configs/classify/lmuformer_vowels.py:smoke  # in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import check_variant, defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    smoke = variant == "smoke"
    config = ConfigDict(dict(task="vowels", task_args={}, seed=0, batch_size=32, steps=4 if smoke else 400))
    config.optimizer = defaults().optimizer
    config.optimizer.warmup_steps = 1 if smoke else 40
    lmu = dict(order=16, theta=29.0)
    models = {
        "LMUFormer": dict(width=48, mixer_args=lmu),
        "spiking": dict(width=48, mixer_args=lmu | dict(spiking=True), spiking=True),
        "attention": dict(width=48, mixer="SlidingWindowAttention", mixer_args=dict(heads=2, window=29)),
    }
    if smoke:
        models = {"LMUFormer": models["LMUFormer"]}
    config.models = ConfigDict({name: dict(kind="LMUFormer", args=args) for name, args in models.items()})
    return config
