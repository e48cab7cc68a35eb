"""Properties of ssd alone: a backend by name; and of trapezoidal_ssd: a share of one is ssd."""

import jax
import numpy as np

import frugax
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS, run


def test_a_share_of_one_is_mamba_2():
    row = OPERATIONS["trapezoidal_ssd"]
    a = row.arguments({"T": 70, "state": False})
    rates = -np.linspace(0.2, 1, 4).astype(np.float32)
    a |= {"mix": np.ones_like(a["mix"]), "A": np.broadcast_to(rates, a["A"].shape)}
    shared = {n: a[n] for n in ("x", "dt", "B", "C", "D", "segment_ids")}
    want, _ = jax.jit(frugax.kernels.ssd)(A=rates, **shared)
    assert_close(run(row, a)[0], want, "float32")
