"""Two real processes that share each batch have the losses of one."""

import json
import socket

import numpy as np

from experiments.train import train
from tests.errors import bound
from tests.experiments.runs import command, finish, logged, start, tiny_config, write_corpus


def test_two_processes_have_the_losses_of_one(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fields = dict(steps=6, batch_size=4, accumulate=2, evaluation__every=3, sample__tokens=0)
    together = fields | dict(
        distributed__enabled=True, distributed__coordinator=f"localhost:{port}", distributed__processes=2
    )
    two = [start(command(corpus, tmp_path / "two", **together, distributed__process=i)) for i in range(2)]
    train(tiny_config(corpus, tmp_path / "one", **fields))
    outputs = [finish(process) for process in two]

    assert "held out" in outputs[0]
    assert "held out" not in outputs[1]  # only the first process writes
    for name in ("held_out_bits_per_byte", "best_held_out_bits_per_byte"):
        one, two = (json.loads((tmp_path / run / "summary.json").read_text())[name] for run in ("one", "two"))
        np.testing.assert_allclose(one, two, rtol=10 * bound("float32"))
    expected, actual = (logged(tmp_path / name, "loss", "grad_norm") for name in ("one", "two"))
    assert len(expected) == 6
    # The same sums in another order, through six updates.
    np.testing.assert_allclose(actual, expected, rtol=10 * bound("float32"))
