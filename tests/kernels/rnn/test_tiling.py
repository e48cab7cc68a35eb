"""Tiles of chips: they divide what they must, and past some size there are none."""

import itertools

import pytest

from frugax.kernels.rnn.cells import CELLS
from frugax.kernels.rnn.tiling import Shape, for_gpu, for_tpu


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_tiles_for_chips(cell, backward):
    """Larger heads only cost, until none is served."""
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
