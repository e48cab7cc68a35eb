"""The first job: whether this machine can do the others, and what it is.

python -m experiments.benchmarks.hopper.machine --output FILE [--rehearse]
"""

import argparse
import datetime
import importlib
import sys
from pathlib import Path

from .jobs import write_json

ROOT = Path(__file__).resolve().parents[3]  # the checkout
NEEDED = ("jax", "numpy", "flax", "optax", "chex", "jaxtyping", "frugax.kernels")


def problem() -> str | None:
    """Return why nothing can run here; None if it can."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as missing:
            return f"can't import {name}: {missing} (a wheel of it may come with --wheels)"
    return None


def main() -> None:
    """Write chip, date and versions, or say what is in the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if reason := problem():
        sys.exit(reason)

    import jax

    import frugax
    from experiments.benchmarks import gpu

    if Path(next(iter(frugax.__path__))).resolve() != ROOT / "lib":
        sys.exit(f"frugax: got {frugax.__path__}; expected the checkout's, {ROOT / 'lib'}")

    try:
        chip = jax.devices()[0].device_kind
    except RuntimeError as error:
        sys.exit(
            f"jax finds no GPU; is jax-cuda13-plugin of jax's version {jax.__version__} installed? {error}"
        )
    if not options.rehearse and (reason := gpu.why_not()):
        sys.exit(reason)
    found = {
        "chip": chip,
        "date": datetime.date.today().isoformat(),
        "versions": gpu.versions(),
    }
    write_json(options.output, found)
    print(found)


if __name__ == "__main__":
    main()
