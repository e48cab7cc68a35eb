"""EfficientVMamba's block beside VMamba's on scikit-learn's digits, 8 x 8 images.

Reproduces: no published run; atrous (Pei et al. 2024, arXiv 2403.09977) against cross scan (2401.10166).
Should reach: 96 % and 97 %, as logistic regression; the nearest of 1,438 images tells 99 % of the others.
Time: a minute a model on one core.

  python -m experiments.classify --config=experiments/configs/classify/vmamba_digits.py
  python -m experiments.classify --config=experiments/configs/classify/vmamba_digits.py:smoke  # in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import check_variant, defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    smoke = variant == "smoke"
    sizes = dict(widths=(16, 32), depths=(1, 1), patch=1, scan_args=dict(state_size=4), mlp_expand=2)
    config = ConfigDict(dict(task="digits", task_args={}, seed=0, batch_size=64, steps=4 if smoke else 1000))
    config.optimizer = defaults().optimizer
    config.optimizer.learning_rate = 1e-2
    config.optimizer.weight_decay = 2.0  # 1,438 images are learned by heart without
    config.optimizer.warmup_steps = 1 if smoke else 50
    evss = dict(kind="VisionMamba", args=sizes | dict(blocks=("EVSS", "InvertedResidual")))
    vss = dict(kind="VisionMamba", args=sizes | dict(blocks=("VSS", "InvertedResidual")))
    config.models = ConfigDict({"EVSS": evss} if smoke else {"EVSS": evss, "VSS": vss})
    return config
