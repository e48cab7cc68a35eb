"""Batch and channels split over a mesh: no gathering, the same numbers."""

import pytest

from tests.devices import run_on_eight_devices


@pytest.mark.full
def test_eight_virtual_devices():
    run_on_eight_devices("tests.kernels.selective_scan.sharded")
