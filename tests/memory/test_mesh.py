"""Policies, offload and tiles over eight devices: the step of one device without them."""

import pytest

from tests.devices import run_on_eight_devices


@pytest.mark.full  # 15 CPU seconds; tests of one device have each field
def test_less_memory_over_a_mesh_is_the_same_step():
    run_on_eight_devices("tests.memory.mesh_calls")


def test_a_head_in_tiles_travels_once_each_way():
    run_on_eight_devices("tests.memory.head_calls")
