"""Operations under a mesh of eight devices give the numbers of one device, forward and backward."""

import pytest

from tests.devices import run_on_eight_devices

FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("what", "types"),
    [
        *((what, ["Explicit"]) for what in ("placements", "whole", "transformed")),
        *(pytest.param(what, ["Auto"], marks=FULL) for what in ("placements", "whole", "transformed")),
        ("quiet", ["Auto"]),
        pytest.param("quiet", ["Explicit"], marks=FULL),
        ("manual", []),
        ("partitioned", []),
    ],
)
def test_sharded_calls_equal_whole_ones(what, types):
    run_on_eight_devices("tests.kernels.common.sharded_calls", what, *types)
