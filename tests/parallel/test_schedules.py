"""Schedules of pipelines: every pass once, in an order that can run, with the paper's bubble and memory."""

import itertools

import pytest

import frugax
from frugax.parallel.schedules import Task, pipeline_schedule, pipeline_timeline

SIZES = [(1, 3, 1), (2, 2, 1), (4, 8, 1), (4, 5, 1), (3, 1, 1), (2, 4, 2), (4, 8, 2), (4, 16, 4), (3, 6, 3)]


@pytest.mark.parametrize(("stages", "microbatches", "chunks"), SIZES)
def test_a_schedule_runs_every_pass_once_with_the_papers_bubble(stages, microbatches, chunks):
    schedule = pipeline_schedule(stages, microbatches, chunks=chunks)
    every = set(itertools.product(("forward", "backward"), range(chunks), range(microbatches)))
    for tasks in schedule:
        assert len(tasks) == len(every)
        assert set(map(tuple, tasks)) == every
    for forward, backward in ((1.0, 2.0), (3.0, 3.0)):
        found = pipeline_timeline(schedule, forward=forward, backward=backward)
        if microbatches >= stages:  # else the pipeline never fills
            assert found.bubble == pytest.approx((stages - 1) / (chunks * microbatches))
    if chunks == 1:
        assert found.in_flight == tuple(min(stages - rank, microbatches) for rank in range(stages))
    else:  # 2 (P - 1 - r) + (v - 1) P ahead, and one more
        ahead = [2 * (stages - 1 - rank) + (chunks - 1) * stages + 1 for rank in range(stages)]
        assert found.in_flight == tuple(min(n, microbatches * chunks) / chunks for n in ahead)


def test_a_timeline_by_hand():
    """Two stages, two microbatches: forward 1, backward 2, a message 0.5."""
    found = pipeline_timeline(pipeline_schedule(2, 2), send=0.5)
    # Stage 0: f0 0-1, f1 1-2, b0 at 4.5 + .5; stage 1: f0 1.5-2.5, b0 2.5-4.5, f1 4.5-5.5, b1 5.5-7.5.
    assert found.starts == ((0.0, 1.0, 5.0, 8.0), (1.5, 2.5, 4.5, 5.5))
    assert found.seconds == 10.0
    assert found.bubble == pytest.approx(10 / 6 - 1)


def test_all_forward_first_holds_every_microbatch():
    gpipe = [
        [Task(d, 0, m) for d in ("forward", "backward") for m in range(8)]
        for _ in range(4)
    ]  # fmt: skip
    found = pipeline_timeline(gpipe)
    assert found.in_flight == (8.0,) * 4
    assert found.bubble == pytest.approx(3 / 8)


def test_what_can_not_be():
    with pytest.raises(ValueError, match="microbatches: got 3; expected a multiple of 2 stages for 2 chunks"):
        pipeline_schedule(2, 3, chunks=2)
    with pytest.raises(ValueError, match="stages: got 0; expected at least 1"):
        frugax.parallel.pipeline_schedule(0, 3)
    with pytest.raises(ValueError, match="schedule: got tasks that wait for each other"):
        pipeline_timeline([[Task("backward", 0, 0), Task("forward", 0, 0)]])
