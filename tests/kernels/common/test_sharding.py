"""Operations under a mesh of eight devices give the numbers of one device, forward and backward."""

import pytest

from tests.devices import run_on_eight_devices


@pytest.mark.parametrize("what", ["placements", "whole", "transformed", "manual", "partitioned", "quiet"])
def test_sharded_calls_equal_whole_ones(what):
    run_on_eight_devices("tests.kernels.common.sharded_calls", what)
