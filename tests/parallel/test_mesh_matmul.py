"""Products on grids and lines of devices give the numbers of one device, by short messages."""

import pytest

import frugax
from frugax.parallel.mesh_matmul import _strides
from tests.devices import run_on_eight_devices


@pytest.mark.parametrize(
    "case",
    [
        "gemm 2",
        "gemv 8 2",
        *(pytest.param(f"gemv {c}", marks=pytest.mark.full) for c in ("8 3", "7 2", "5 1")),
    ],
)
def test_products_on_a_grid_are_whole_ones(case):
    run_on_eight_devices("tests.parallel.mesh_calls", *case.split())


@pytest.mark.parametrize("devices", range(1, 20))
def test_no_step_of_a_folded_ring_is_longer_than_two(devices):
    ring = frugax.parallel.folded_ring(devices)
    assert sorted(ring) == list(range(devices))
    assert max(abs(ring[i] - ring[i - 1]) for i in range(devices)) <= 2


def test_a_tree_reaches_every_device():
    for devices in range(1, 40):
        for levels in (1, 2, 3):
            strides = _strides(devices, levels)
            reach = 1
            for stride, size in strides:
                assert stride == reach
                reach *= size
            assert reach >= devices
            assert len(strides) <= levels


def test_costs_grow_as_the_paper_says():
    cost = frugax.parallel.mesh_cost
    for side in (8, 32, 128):
        folded, cannon, summa, gather = (cost(m, side) for m in ("meshgemm", "cannon", "summa", "allgather"))
        assert folded.hops == 2 * (side - 1) < cannon.hops < summa.hops
        assert folded.blocks == cannon.blocks < summa.blocks < gather.blocks
        assert cost("ktree", side).messages < 4 * side**0.5 + 2 < cost("ring", side).messages + 2
        assert cost("ktree", side).hops < 3 * side


def test_an_unknown_method_is_named(unchecked_types):
    with pytest.raises(ValueError, match="method: got 'strassen'; expected one of meshgemm, cannon"):
        frugax.parallel.mesh_cost("strassen", 2)
