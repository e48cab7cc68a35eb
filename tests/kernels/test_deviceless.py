"""Every operation's kernels, forward and backward, through the compilers of the chips they are for."""

import importlib.util
import re

import pytest

from experiments.benchmarks import deviceless_gpu, deviceless_tpu

from .harness import OPERATIONS, both_passes, text

pytestmark = pytest.mark.deviceless
SHARED_BYTES = 227 * 1024  # of a block on an H200


def for_tpus() -> list:
    """Return (operation, chip, case): by default an operation's first two, on a chip each."""
    kept = list(zip(("v5e", "v6e"), (0, 1), strict=True))
    return [
        pytest.param(
            *(row.name, chip, case),
            id=f"{row.name}-{chip}-{text(case)}",
            marks=[] if (chip, i) in kept else pytest.mark.full,
        )
        for row in OPERATIONS.values()
        for chip in deviceless_tpu.CHIPS
        for i, case in enumerate(row.on_tpu)
    ]


def for_gpu() -> list:
    """Return (operation, case): by default each operation's first."""
    return [
        pytest.param(row.name, case, id=f"{row.name}-{text(case)}", marks=pytest.mark.full if i else [])
        for row in OPERATIONS.values()
        for i, case in enumerate(row.on_gpu)
    ]


@pytest.mark.skipif(
    not deviceless_tpu.has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)"
)
@pytest.mark.parametrize(("operation", "chip", "case"), for_tpus())
def test_compiles_for_tpu(operation, chip, case):
    row = OPERATIONS[operation]
    function, arguments = both_passes(row, case)
    program = deviceless_tpu.compile_for(chip, function, *arguments).as_text()
    assert len(re.findall(r"custom-call\(.*tpu_custom_call", program)) == row.kernels[0]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize(("operation", "case"), for_gpu())
def test_compiles_for_h200(operation, case):
    """Registers stay in registers, but for some of the pass back, and a block fits into shared memory."""
    row = OPERATIONS[operation]
    function, arguments = both_passes(row, case)
    kernels = deviceless_gpu.kernels_for_h200(function, *arguments)
    assert len(kernels) == row.kernels[1], deviceless_gpu.table(kernels)
    for kernel in kernels:
        most = row.spilled if re.search("backward|gradients", kernel.name) else 0
        assert max(kernel.spill_stores, kernel.spill_loads) <= most, deviceless_gpu.table(kernels)
        assert kernel.shared_bytes <= SHARED_BYTES, deviceless_gpu.table(kernels)
        assert kernel.wgmma > 0 or not row.wgmma
