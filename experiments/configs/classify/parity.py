"""Parity of the bits so far: an LSTM and an sLSTM, with gates that see the last state, and two linear-time
models, with gates that can't.

Reproduces: the state tracking of Pöppel et al. 2024 (FlashRNN, arXiv 2412.07752) and xLSTM (2405.04517), far
smaller; also tested at lengths never trained at, on the bits beyond the trained length.
Should reach: 100 % for the LSTM and the sLSTM at the trained length of 40, 84 % for Mamba and 73 % for gated
linear attention; beyond it, 100 % for the sLSTM up to 1280 bits and for the LSTM up to 320 (84 % at 1280),
chance for both others from 80 on.
Time: one to two minutes a model on one core.

  python -m experiments.classify --config=experiments/configs/classify/parity.py
  python -m experiments.classify --config=experiments/configs/classify/parity.py:smoke  # in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import check_variant, defaults


def get_config(variant: str = "") -> ConfigDict:
    """The config; variant "smoke" ends in seconds."""
    check_variant(variant)
    smoke = variant == "smoke"
    counts = dict(train=100, held_out=50) if smoke else dict(train=100_000, held_out=200)
    task = counts | dict(length=40, seed=0, longer=(80,) if smoke else (80, 320, 1280))
    config = ConfigDict(
        dict(task="parity", task_args=task, seed=0, batch_size=64, steps=4 if smoke else 1500)
    )
    config.optimizer = defaults().optimizer
    config.optimizer.learning_rate = 5e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 1 if smoke else 100
    mixers = {
        "LSTM": ("FlashRNN", dict(cell="lstm", heads=2)),
        "sLSTM": ("FlashRNN", dict(cell="slstm", heads=2)),
        "gated linear attention": ("GatedLinearAttention", dict(heads=2)),
        "Mamba": ("Mamba", dict(state_size=8)),
    }
    config.models = ConfigDict()
    for name, (mixer, args) in mixers.items():
        block = dict(mixer=mixer, channel=None, mixer_args=args)
        config.models[name] = dict(
            kind="Decoder", args=dict(width=32, repeats=2, tie_embeddings=False, blocks=[block])
        )
    return config
