"""Mixers, forms of parallelism and optimizers, each pair of them at least once, against one device."""

import itertools

import pytest

from frugax.layers.block import CHANNELS, mixer_names
from tests.cases import cover
from tests.devices import run_on_eight_devices
from tests.parallel.cover_calls import FORMS, MIXERS, OPTIMIZERS, impossible

EVERY = [
    triple for triple in itertools.product(MIXERS, FORMS, OPTIMIZERS) if not impossible(triple[0], triple[1])
]
CASES = [EVERY[i] for i in cover([set(enumerate(triple)) for triple in EVERY], strength=2)]
DEFAULT = {  # with the smallest programs: what is in no other default test
    ("MLGRU", "zero 3 x tensor", "galore"),
}


def test_every_mixer_is_in_the_cover():
    composed = {"Based", "RWKVChannel"} | set(CHANNELS)
    assert set(MIXERS) - composed == {name for name in mixer_names() if name not in composed}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id="-".join(case), marks=[] if case in DEFAULT else pytest.mark.full)
        for case in [*sorted(DEFAULT - set(CASES)), *CASES]
    ],
)
def test_a_step_over_devices_is_that_of_one(case):
    """The loss and each gradient to 1e-5; the update of these gradients as far as the optimizer allows."""
    run_on_eight_devices("tests.parallel.cover_calls", *case)
