"""Plans of the configs in experiments/configs/pods, each compiled for its devices: nothing is run.

  python -m experiments.benchmarks.pods             all, a few minutes each on two cores
  python -m experiments.benchmarks.pods gla_1p3b    one alone; the others' rows stay

Writes results/pods.json, which docs/results/planning.md tabulates.
"""

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.benchmarks.interleaved import about, write
from experiments.benchmarks.markdown import RESULTS, read
from experiments.plan import Progress, plan_config
from frugax.planner import topology

PODS = {  # a config, and the devices that it is for
    "gla_1p3b": "v5e:16x16",
    "gla_1p3b_h100": "h100:8",
    "hybrid_7b": "v5p:4x8x8",
    "moe_30b_a3b": "v5p:8x8x8",
    "gla_7b_1m": "v6e:16x16",
}


def config_of(name: str, variant: str = "") -> ConfigDict:
    """The config of a pod by its name."""
    return importlib.import_module(f"experiments.configs.pods.{name}").get_config(variant)


def row(name: str) -> dict[str, Any]:
    """Plan one config for its devices."""
    config = config_of(name)
    made = plan_config(config, topology(PODS[name]), Progress())
    print(f"\n{made.table()}\n", flush=True)
    tokens = config.batch_size * config.data.sequence_length
    return made.as_dict() | {"tokens_a_step": tokens, "context": config.data.sequence_length} | about()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"by default all: {', '.join(PODS)}")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in PODS]
    if unknown:
        parser.error(f"names: got {', '.join(unknown)}; expected some of {', '.join(PODS)}")
    path = RESULTS / "pods.json"
    for name in args.names or PODS:
        made = row(name)
        rows = read("pods")["rows"] if path.exists() else {}
        write(
            Path(path),
            {"rows": {n: made if n == name else rows.get(n) for n in PODS if n in rows or n == name}},
        )


if __name__ == "__main__":
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is taken
    main()
