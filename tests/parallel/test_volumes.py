"""Bytes of state and of collectives by kind of parallelism, read off compiled steps, against formulas."""

import jax
import pytest

from experiments.benchmarks.deviceless_tpu import has_libtpu
from frugax.planner import topology
from tests.devices import run_on_eight_devices
from tests.parallel.steps import compile_step
from tests.parallel.volume_calls import BLOCK, PARALLEL, payload, shared_bytes


@pytest.mark.full
@pytest.mark.parametrize("kind", ["zero", "tensor", "moments"])
def test_bytes_follow_the_papers_formulas(kind):
    run_on_eight_devices("tests.parallel.volume_calls", kind)


def v5e():
    return topology("v5e:2x4").devices


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
def test_stages_of_zero_move_two_to_three_on_a_tpu():
    """Gradients are reduced and scattered once; params gathered once, or at both uses: 1 to 1.5."""
    sizes = dict(devices=v5e(), fsdp=8, width=128, time=128, vocab=16)
    with jax.default_matmul_precision("highest"):  # else a gather is of the bfloat16 that products read
        two, three = (compile_step(BLOCK, zero=stage, **sizes) for stage in (2, 3))
    for step, times in ((two, 1), (three, 2)):
        shared = shared_bytes(step)
        assert payload(step, "reduce-scatter", least=4096) == shared
        assert payload(step, "all-gather", least=4096) == times * shared, times
        assert payload(step, "all-reduce") < 0.1 * shared


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
def test_a_parallel_block_sends_half_on_a_tpu():
    """One sum over the tensor axis forward and one backward, where a serial block has two each way."""
    sums = {}
    for block in (BLOCK, PARALLEL):
        step = compile_step(block, devices=v5e(), data=2, tensor=4, width=128, time=128)
        inside = [
            c for c in step.collectives if c.kind == "all-reduce" and c.axes == ("tensor",) and c.times == 2
        ]
        sums[block.parallel] = [c.payload_bytes for c in inside]
    x = 4 * 128 * 128 * 4
    assert sums == {False: [x] * 4, True: [x] * 2}
