"""The search for tiles: its answers keep every limit, it misses none, and where there is none it says why."""

import itertools

import pytest

from frugax.kernels.rnn.cells import CELLS
from frugax.kernels.rnn.tiling import Limit, Shape, for_gpu, for_tpu, search

LIMITS = [Limit("apples", 40, lambda a, b: a * b), Limit("pears", 9, lambda a, b: a + b)]


def test_search_is_brute_force():
    space = {"a": range(1, 12), "b": range(1, 12, 2)}
    cost = lambda a, b: (-a * b, a)  # noqa: E731
    found = search(space, LIMITS, cost)
    feasible = [(a, b) for a, b in itertools.product(*space.values()) if a * b <= 40 and a + b <= 9]
    assert found.sizes is not None
    assert tuple(found.sizes.values()) == min(feasible, key=lambda c: cost(*c))
    assert found.reason is None


@pytest.mark.parametrize(
    ("space", "reason"),
    [
        ({"a": [50], "b": [1, 2]}, "at least 50 apples, 40 are there"),
        ({"a": [9, 10], "b": [1]}, "at least 10 pears, 9 are there"),
        ({"a": [1, 9], "b": [5, 41]}, None),
        ({"a": [], "b": [1]}, "no size of a divides what it must"),
    ],
)
def test_nothing_feasible_says_why(space, reason):
    found = search(space, LIMITS, lambda a, b: 0)
    assert found.reason == reason
    assert (found.sizes is None) == (reason is not None)


def test_limits_that_only_together_leave_nothing():
    limits = [Limit("x", 1, lambda a: a), Limit("y", 1, lambda a: 3 - a)]
    assert search({"a": [1, 2]}, limits, lambda a: 0).reason == "no choice of sizes keeps all of: x, y"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_for_chips(cell, backward):
    """Tiles divide what they must, larger heads only cost, and past some size there are none."""
    for choose, sizes, itemsize in ((for_tpu, (1, 100, 128, 700, 1024), 4), (for_gpu, (1, 64, 128), 2)):
        for size, batch, packed in itertools.product(sizes, (1, 17, 500), (False, True)):
            shape = Shape(batch, 33, 4, size, itemsize, packed)
            tiling, reason = choose(CELLS[cell], shape, backward=backward)
            assert reason is None
            assert tiling.batch % (8 if itemsize == 4 else 16) == 0
            assert tiling.batch < batch + 16
            if choose is for_tpu:
                padded = -(-size // 128) * 128
                assert padded % tiling.columns == 0
                assert tiling.columns % 128 == 0
        refused = [
            choose(CELLS[cell], Shape(1, 33, 4, n, itemsize, False), backward=backward)[1]
            for n in (8192, 9000)
        ]
        assert all("memory" in reason or "VMEM" in reason for reason in refused)
