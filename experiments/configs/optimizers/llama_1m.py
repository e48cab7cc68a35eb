"""One Llama-like model of a million parameters, for each memory-efficient optimizer: same data, same start.

Reproduces: the setting of GaLore's and APOLLO's tables (arXiv 2403.03507, 2412.05270) at a size that a CPU
trains: pre-norm softmax attention (over 128 tokens) with rotary positions and gated linear units, rank a
quarter of the width, learning rates each from a grid of its own, no weight decay. 400 steps of 512 bytes are
few, so subspaces are found anew every 50 of them instead of every 200.
Should reach: held out 3.52 bits per byte with AdamW, 3.51 in 8 bits, 3.42 GaLore, 3.32 APOLLO, 3.18 COSMOS;
the others are in experiments/benchmarks/results/optimizers_quality.json. The papers put APOLLO at or below
AdamW, as here, and GaLore a little above it; in so few steps it is below.
Time: a minute a variant on a core; `python -m experiments.benchmarks.optimizers_quality` runs the grid.

  python -m experiments.train --config=experiments/configs/optimizers/llama_1m.py:galore
  python -m experiments.train --config=experiments/configs/optimizers/llama_1m.py:galore,smoke     in seconds
"""

from ml_collections import ConfigDict

from experiments.configs.defaults import block, defaults, shrink

RANK = 36  # a quarter of the width
EVERY = 50  # steps from one subspace to the next

# Of each variant: its name in frugax.optim or optax, its options, and the learning rates that are tried. The
# one in the middle is the config's.
OPTIMIZERS = {
    "adamw": ("adamw", {}, (3e-4, 1e-3, 3e-3)),
    "adamw_8bit": ("adamw_8bit", {}, (3e-4, 1e-3, 3e-3)),
    "galore": ("galore", {"rank": RANK, "update_interval": EVERY}, (3e-3, 1e-2, 3e-2)),
    "q_galore": ("q_galore", {"rank": RANK, "update_interval": EVERY}, (3e-3, 1e-2, 3e-2)),
    "apollo": ("apollo", {"rank": RANK, "update_interval": EVERY}, (3e-3, 1e-2, 3e-2)),
    "apollo_mini": ("apollo_mini", {"update_interval": EVERY}, (1e-3, 3e-3, 1e-2)),
    "frugal": ("frugal", {"density": 0.25, "update_interval": EVERY}, (1e-3, 3e-3, 1e-2)),
    "cosmos": ("cosmos", {"rank": RANK, "adam_scale": 0.1}, (1e-2, 3e-2, 1e-1)),
    "dct_adamw": ("dct_adamw", {"rank": RANK}, (1e-3, 3e-3, 1e-2)),
    "lion": ("lion", {}, (3e-4, 1e-3, 3e-3)),
    "fira": ("fira", {"rank": RANK, "update_interval": EVERY}, (3e-3, 1e-2, 3e-2)),
    "natural_galore": ("natural_galore", {"rank": RANK, "update_interval": EVERY}, (3e-3, 1e-2, 3e-2)),
    "trion": ("trion", {"rank": RANK, "adam_scale": 0.1}, (3e-3, 1e-2, 3e-2)),
    "lisa": ("lisa", {"active": 2}, (3e-4, 1e-3, 3e-3)),
}


def get_config(variant: str = "adamw") -> ConfigDict:
    """The config of an optimizer, by its name in `OPTIMIZERS`; "NAME,smoke" ends in seconds."""
    name, _, smoke = variant.partition(",")
    if name not in OPTIMIZERS or smoke not in ("", "smoke"):
        raise ValueError(
            f"config variant: got {variant!r}; expected one of {', '.join(OPTIMIZERS)}, bare or with ',smoke'"
        )
    config = defaults()
    config.run_dir = f"runs/llama_1m_{name}"
    config.steps = 400
    config.batch_size = 2
    config.data.sequence_length = 256

    config.model.width = 144
    config.model.repeats = 4
    config.model.tie_embeddings = False
    config.model.pattern = ("llama",)
    config.model.blocks.llama = block(
        mixer="SlidingWindowAttention", channel="GLU", mixer_args=dict(heads=4, window=128)
    )

    config.optimizer.name, options, rates = OPTIMIZERS[name]
    config.optimizer.options = ConfigDict(options)
    config.optimizer.learning_rate = rates[1]
    config.optimizer.warmup_steps = 40
    config.optimizer.final_fraction = 0.1
    config.optimizer.weight_decay = 0.0
    config.evaluation.sequence_length = 512
    config.evaluation.max_bytes = 60_000

    if smoke:
        shrink(config)
        config.model.repeats = 2  # of which lisa trains two
    return config
