"""The flags of every runner of configs, defined once: a process may import several runners."""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of experiments/configs; FILE:smoke is the same run in seconds."
)
RUN = flags.DEFINE_string(
    "run", None, "The run's folder; by default config.run_dir, or runs/<name of the config>."
)


def run_dir() -> str:
    """The folder of this command's run."""
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    named = Path(file).stem + (f"-{variant}" if variant else "")
    return RUN.value or CONFIG.value.get("run_dir") or f"runs/{named}"
