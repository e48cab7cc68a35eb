"""Runs of one config on one device and on two, by jit and by pmap: for tests/experiments/test_train.py."""

import sys
from pathlib import Path

import jax

from experiments import train as training
from tests.experiments.runs import tiny_config

MODES = {
    "one": dict(mesh__data=1),
    "jit": {},
    "pmap": dict(parallel="pmap", accumulate=2),
}


def main() -> None:
    """Train in every mode; then go on by jit from what jit saved, and from what pmap saved."""
    assert jax.device_count() >= 2
    corpus, folder = map(Path, sys.argv[1:])
    for name, changes in MODES.items():
        fields = dict(steps=5, batch_size=4, mesh__data=2, checkpoint__every=3) | changes
        training.train(tiny_config(corpus, folder / name, **fields))
    for name, parts in (("pmap", 2), ("jit", 1)):
        fields = dict(steps=7, batch_size=4, accumulate=parts, mesh__data=2)
        training.train(tiny_config(corpus, folder / name, **fields))


if __name__ == "__main__":
    report, training.report = training.report, lambda *args, **kwargs: None
    try:
        main()
    finally:
        training.report = report
