"""Steps of two wide layers over four TPU chips a matrix, by what the chips send: compiled, nothing is run.

  python -m experiments.benchmarks.tensor_messages_tpu v5p GatedLinearAttention    minutes on two cores
  python -m experiments.benchmarks.tensor_messages_tpu v5p GatedLinearAttention rings    one way alone

The trainer's step by each of `mesh.tensor_messages`; times are those of `frugax.planner`. A case replaces its
own rows of the JSON; others stay.
"""

import argparse
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.benchmarks.interleaved import about, write
from experiments.benchmarks.markdown import RESULTS, read
from experiments.configs.defaults import block, defaults
from experiments.plan import Progress, plan_config
from frugax.parallel.activations import TENSOR_MESSAGES
from frugax.planner import topology

NAME = "tensor_messages_tpu"
SLICES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2"}  # of eight chips
MIXERS: dict[str, dict[str, Any]] = {
    "GatedLinearAttention": {"heads": 16},
    "SlidingWindowAttention": {"heads": 32, "window": 2048},
}


def config_of(mixer: str, messages: str) -> ConfigDict:
    """Two layers of width 4096 on two rows of 8192 tokens: data=2, tensor=4."""
    config = defaults()
    config.batch_size = 2
    config.data.sequence_length = 8192
    config.model.vocab_size = 8192
    config.model.width = 4096
    config.model.repeats = 2
    config.model.tie_embeddings = False
    config.model.pattern = ("block",)
    config.model.blocks.block = block(
        mixer=mixer, channel="GLU", mixer_args=MIXERS[mixer], channel_args={"expand": 2.75}
    )
    config.model.dtype = "bfloat16"
    config.memory.remat = "full"
    config.mesh.data = 2
    config.mesh.tensor = 4
    config.mesh.tensor_messages = messages
    return config


def row(chip: str, mixer: str, messages: str) -> dict[str, Any]:
    """Plan one step."""
    made = plan_config(config_of(mixer, messages), topology(SLICES[chip]), Progress())
    print(f"\n{made.table()}\n", flush=True)
    assert made.times is not None
    return about() | {
        "slice": SLICES[chip],
        "mixer": mixer,
        "messages": messages,
        "step_ms": round(1e3 * made.times.step, 2),
        "exposed_ms": round(1e3 * made.times.exposed, 2),
        "hidden_ms": round(1e3 * made.times.hidden, 2),
        "sent_mb": round(sum(n for (axes, _), n in made.collectives.items() if "tensor" in axes) / 1e6),
        "gib": round(made.total / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chip", choices=SLICES)
    parser.add_argument("mixer", choices=MIXERS)
    parser.add_argument("messages", nargs="?", choices=TENSOR_MESSAGES, help="by default each")
    args = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    for messages in [args.messages] if args.messages else TENSOR_MESSAGES:
        made = row(args.chip, args.mixer, messages)
        rows = read(NAME)["rows"] if path.exists() else []
        key = lambda r: (r["slice"], r["mixer"], TENSOR_MESSAGES.index(r["messages"]))  # noqa: E731
        rows = sorted([made, *(r for r in rows if key(r) != key(made))], key=key)
        write(path, {"rows": rows})


if __name__ == "__main__":
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is taken
    main()
