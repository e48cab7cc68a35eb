"""Replicas on eight devices: one device's numbers, the same bits everywhere, scalars or bytes exchanged."""

from tests.devices import run_on_eight_devices


def test_perturbations_data_and_bytes_over_eight_devices():
    run_on_eight_devices("tests.optim.zeroth_order.distributed_runs")
