"""Runs of one config on one device, on two by jit and by pmap, and on other meshes: for test_train.py."""

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
# Where a run begins and where it goes on: shared params on eight devices, then on fewer and on more.
MOVES = (
    dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
    dict(mesh__data=1, mesh__fsdp=4),
    dict(mesh__data=1, mesh__tensor=8),
)


def main() -> None:
    """Train in every mode; then go on by jit from what jit saved, and from what pmap saved."""
    assert jax.device_count() >= 2
    corpus, folder = map(Path, sys.argv[1:3])
    if sys.argv[3:] == ["moves"]:
        for number, mesh in enumerate(MOVES):
            fields = dict(steps=3 * (number + 1), batch_size=4, checkpoint__every=3, **mesh)
            training.train(tiny_config(corpus, folder / "moves", **fields))
        whole = dict(steps=9, batch_size=4, checkpoint__every=3, mesh__data=1)
        for steps in (3, 6, 9):  # the schedule is that of each part
            training.train(tiny_config(corpus, folder / "stays", **whole | {"steps": steps}))
        return
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
