"""Block sizes: the search's answers keep every limit, it misses none, and where there is none it says why."""

import itertools

import pytest

from frugax.kernels.common.tiling import Limit, largest, largest_divisor, round_up, search

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


def test_largest_keeps_what_fits():
    assert largest([3, 9, 6, 7], lambda n: n % 3 == 0 and n < 9) == 6
    assert largest([3, 5], lambda n: False, otherwise=1) == 1
    with pytest.raises(ValueError, match="none fits"):
        largest([3, 5], lambda n: False)


@pytest.mark.parametrize("n", range(1, 13))
def test_divisors_and_multiples(n):
    for m in range(1, 15):
        assert largest_divisor(n, m) == max(d for d in range(1, m + 1) if n % d == 0)
        assert round_up(n, m) == next(x for x in range(n, n + m) if x % m == 0)
