"""Groups of several degrees: brute force on small steps, one degree on long-tailed ones, and gradients."""

import itertools

import numpy as np
import pytest

from frugax.planner import (
    SequenceCosts,
    bucket_lengths,
    group_seconds,
    plan_groups,
    plan_step,
    split_microbatches,
)
from tests.devices import run_on_eight_devices

# All-to-alls of two devices are fast, those of eight leave the node.
COSTS = SequenceCosts(2e-3, 1.0, 3.0, 4.0, {1: 1.0, 2: 8.0, 4: 4.0, 8: 0.5}, 12)


def brute_force(lengths, devices, costs):
    """The least seconds over all sets of groups and all assignments that fit."""
    degrees = [d for d in costs.bandwidth if d <= devices]
    least = np.inf
    for count in range(1, len(lengths) + 1):
        for groups in itertools.combinations_with_replacement(degrees, count):
            if sum(groups) > devices:
                continue
            for to in itertools.product(range(count), repeat=len(lengths)):
                members = [[n for n, p in zip(lengths, to, strict=True) if p == g] for g in range(count)]
                fits = all(sum(m) <= costs.capacity * d for m, d in zip(members, groups, strict=True))
                if fits and all(members):
                    seconds = max(costs.seconds(m, d) for m, d in zip(members, groups, strict=True))
                    least = min(least, seconds)
    return least


def check(groups, lengths, devices, costs):
    assert sorted(i for g in groups for i in g.sequences) == list(range(len(lengths)))
    assert sum(g.degree for g in groups) <= devices
    for g in groups:
        assert sum(lengths[i] for i in g.sequences) <= costs.capacity * g.degree
        assert g.degree in costs.bandwidth


@pytest.mark.parametrize(
    "lengths",
    [[20, 5, 4, 3], [9, 9, 9, 9], [23, 11, 1], pytest.param([13, 12, 7, 3, 2], marks=pytest.mark.full)],
)
def test_groups_are_brute_forces(lengths):
    groups = plan_groups(lengths, 4, COSTS)
    check(groups, lengths, 4, COSTS)
    assert group_seconds(groups, lengths, COSTS) == pytest.approx(brute_force(lengths, 4, COSTS))


def test_several_degrees_are_no_slower_than_the_best_one():
    rng = np.random.default_rng(0)
    gained = []
    costs = COSTS._replace(quadratic=1e-4, capacity=400)
    for _ in range(2):
        lengths = np.minimum(np.exp(rng.normal(3.5, 1.2, 16)).astype(int) + 1, 1600).tolist()
        groups = plan_groups(lengths, 8, costs, buckets=8)
        check(groups, lengths, 8, costs)
        seconds = group_seconds(groups, lengths, costs)
        static = []
        for degree, speed in costs.bandwidth.items():
            if max(lengths) <= degree * costs.capacity:
                one = costs._replace(bandwidth={degree: speed})
                static.append(group_seconds(plan_groups(lengths, 8, one, buckets=8), lengths, costs))
        gained.append(min(static) / seconds)
        assert gained[-1] >= 0.999
    assert max(gained) > 1.1


def test_a_step_fits_in_its_microbatches():
    lengths = [12, 40, 3, 9, 30, 11, 80, 6]
    step = plan_step(lengths, 8, COSTS)
    assert sorted(i for groups in step for g in groups for i in g.sequences) == list(range(8))
    for groups in step:
        assert sum(g.degree for g in groups) <= 8
        assert all(sum(lengths[i] for i in g.sequences) <= 12 * g.degree for g in groups)
    assert len(step) >= -(-sum(lengths) // 96)


def test_buckets_and_runs_are_the_best_by_brute_force():
    rng = np.random.default_rng(1)
    for n, count in ((7, 3), (6, 1), (5, 5), (6, 9)):
        lengths = rng.integers(1, 9, n).tolist()
        s = sorted(lengths)
        added, most = [], []
        for parts in range(1, min(count, n) + 1):
            for cuts in itertools.combinations(range(1, n), parts - 1):
                runs = [s[a:b] for a, b in itertools.pairwise([0, *cuts, n])]
                added.append(sum(len(r) * r[-1] - sum(r) for r in runs))
                most.append(max(map(sum, runs)))
        buckets = bucket_lengths(lengths, count)
        of = lambda numbers: [lengths[i] for i in numbers]  # noqa: B023, E731
        assert sorted(i for b in buckets for i in b) == list(range(n))
        assert len(buckets) <= count
        assert sum(len(b) * max(of(b)) - sum(of(b)) for b in buckets) == min(added)
        runs = split_microbatches(lengths, count)
        assert sorted(i for r in runs for i in r) == list(range(n))
        assert max(sum(of(r)) for r in runs) == min(most)


@pytest.mark.full
def test_groups_give_the_loss_and_gradients_of_one_device():
    run_on_eight_devices("tests.planner.flexsp_calls")


def test_what_can_not_be():
    with pytest.raises(
        ValueError, match="lengths: got 50 tokens, 50 in the longest; expected what groups of 4"
    ):
        plan_groups([50], 4, COSTS)
    with pytest.raises(ValueError, match="lengths: got a sequence of 100 tokens; expected at most 96"):
        plan_step([100], 8, COSTS)
