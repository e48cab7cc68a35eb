"""Batch and heads split over a mesh: no gathering, the same numbers."""

from tests.devices import run_on_eight_devices


def test_eight_virtual_devices():
    run_on_eight_devices("tests.kernels.rnn.sharded")
