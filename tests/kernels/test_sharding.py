"""Every operation on a mesh of eight devices gives the numbers of one device, and gathers nothing."""

import pytest

from tests.devices import run_on_eight_devices

from .harness import OPERATIONS


def placed() -> list:
    """Return (operation, backend, kind of mesh): by default one backend, a kernel where that is quick."""
    return [
        pytest.param(row.name, backend, kind, marks=[] if (backend, kind) == first else pytest.mark.full)
        for row in OPERATIONS.values()
        if row.placed
        for first in [("pallas_tpu", "Explicit") if row.quick else (None, "Auto")]
        for backend in row.cases
        if backend not in ("reference", "pallas_gpu", "chunks", "fft")
        for kind in row.meshes
    ]


@pytest.mark.parametrize(("operation", "backend", "kind"), placed())
def test_a_sharded_call_equals_a_whole_one(operation, backend, kind):
    run_on_eight_devices("tests.kernels.sharded", operation, str(backend), kind)
