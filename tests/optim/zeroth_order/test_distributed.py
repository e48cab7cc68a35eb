"""Replicas on eight devices: one device's numbers, the same bits everywhere, scalars or bytes exchanged."""

import pytest

from tests.devices import run_on_eight_devices


@pytest.mark.nan
@pytest.mark.parametrize("forms", ["first", pytest.param("every", marks=pytest.mark.full)])
def test_perturbations_data_and_bytes_over_eight_devices(forms):
    run_on_eight_devices("tests.optim.zeroth_order.distributed_runs", forms)
