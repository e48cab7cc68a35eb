"""Optimizers under FSDP and tensor sharding: a moment stays where it is."""

import pytest

from tests.devices import run_on_eight_devices


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "width"),
    [*((name, 2048) for name in ("adam_8bit", "galore", "q_galore", "apollo", "frugal")), ("q_galore", 1024)],
)
def test_no_moment_is_sent(name, width):
    """No collective of the compiled update reads, or makes, the numbers of a moment.

    Of widths that are multiples of 8 * 256 groups of codes lie as the params do; at 1024 only over fsdp.
    """
    run_on_eight_devices("tests.parallel.moment_calls", name, str(width))
