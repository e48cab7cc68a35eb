"""The messages of devices along "tensor": the same numbers in every way, and what a program sends."""

import pytest

import frugax
from tests.devices import run_on_eight_devices


@pytest.mark.full
@pytest.mark.parametrize("mixer", ["GatedLinearAttention", "SlidingWindowAttention", "Mamba2", "RWKV6"])
def test_a_step_is_that_of_one_device(mixer):
    run_on_eight_devices("tests.parallel.messages_calls", "equal", mixer)


@pytest.mark.full
@pytest.mark.parametrize("what", ["sent", "left", "narrow"])
def test_rings_replace_whole_messages(what):
    run_on_eight_devices("tests.parallel.messages_calls", what)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match=r"way: got 'ring'; expected one of 'sums', 'rings'"):
        frugax.parallel.tensor_messages("ring")
