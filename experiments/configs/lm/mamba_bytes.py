"""Mamba on the Python sources of this interpreter, byte by byte.

Reproduces: no published run. The layer is that of Mamba (Gu and Dao 2023, arXiv 2312.00752), without a
channel mixer between, as there.
Should reach: about 1.72 bits per byte on held-out files, where the quickstart needs 1.83 and gzip -9 1.75.
Time: 27 minutes on one CPU core.

  python -m experiments.train --config=experiments/configs/lm/mamba_bytes.py
  python -m experiments.train --config=experiments/configs/lm/mamba_bytes.py:smoke     ends in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, check_variant, shrink
from experiments.configs.lm import quickstart


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    config = quickstart.get_config()  # its data, optimizer and length

    config.model.repeats = 8
    config.model.pattern = ("mamba",)
    config.model.blocks = ConfigDict()
    config.model.blocks.mamba = block(mixer="Mamba", channel=None, mixer_args=dict(state_size=16))

    if variant == "smoke":
        shrink(config)
    return config
