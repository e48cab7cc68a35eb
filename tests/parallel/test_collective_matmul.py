"""Products in pieces, compiled for a TPU: their messages travel beside the products."""

import pytest

from experiments.benchmarks.collective_matmul_tpu import WAYS, predict
from experiments.benchmarks.deviceless_tpu import has_libtpu


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
@pytest.mark.parametrize("kind", WAYS)
def test_messages_hide_behind_products_on_a_tpu(kind):
    """A product takes 350 us on each of four chips, and its input 250 us to arrive, by the compiler's
    cycles and the links' speed.

    Nothing of a gather is left for copies of our own to hide, and 7 % of a scatter; rings take a third, or a
    sixth, less time than collectives by themselves.
    """
    at_once, in_pieces = predict(kind, "v5e:2x2", (4096, 4096, 8192))
    assert at_once.hidden < 1e-6 < 0.3 * at_once.step < at_once.exposed
    assert in_pieces.hidden > 400e-6
    assert in_pieces.exposed < 0.1 * in_pieces.step
    assert in_pieces.step < 0.9 * at_once.step
