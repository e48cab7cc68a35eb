"""The dense model beside moe_bytes.py: one GLU a layer, as wide as the experts that a token reads there.

Reproduces: nothing published; it is the other row of moe_bytes.py.
Should reach: 1.91 bits per byte on held-out files, where moe_bytes.py has 1.84.
Time: two minutes on two cores.

  python -m experiments.train --config=experiments/configs/moe/dense_bytes.py
  python -m experiments.train --config=experiments/configs/moe/dense_bytes.py:smoke     ends in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block
from experiments.configs.moe import moe_bytes


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    config = moe_bytes.get_config(variant)
    with config.unlocked():
        config.model.pattern = ("dense",)
        config.model.blocks = ConfigDict()
        config.model.blocks.dense = block(mixer="MLGRU", channel="GLU", channel_args=dict(expand=2.0))
    return config
