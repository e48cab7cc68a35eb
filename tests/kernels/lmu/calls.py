"""Calls of lmu: how one is drawn, and which each method has to get right."""

import jax.numpy as jnp

from tests.kernels.draws import document_ids, ones, wide


def draw(rng, T, order=6, theta=20.0, B=2, D=3, state=False, packed=False, dtype="float32", **more):
    args = {"u": rng.standard_normal((B, T, D)).astype(jnp.dtype(dtype)), "order": order, "theta": theta}
    if state:
        args["initial_state"] = rng.standard_normal((B, D, order)).astype(wide(dtype))
    if packed:
        args["segment_ids"] = document_ids(rng, B, T)
    return args | more


CASES = {
    "fft": [
        {"T": 45, "state": True, "dtype": "float64"},
        {"T": 45, "dtype": "bfloat16"},
        {"T": 1, "state": True},
        {"T": 45, "state": True},
        {"T": 1},
    ],
    "chunks": [{"T": 70, "state": True}, {"T": 9, "dtype": "bfloat16"}],
    "recurrent": [{"T": 45, "state": True, "packed": True}, {"T": 1, "dtype": "bfloat16"}],
    None: [{"T": 45}],
}

GOOD = {"u": ones((2, 5, 3)), "order": 4, "theta": 9.0}
WRONG = [
    ({"u": ones((2, 5))}, r"u: got float32\[2, 5\]; expected floating \[batch, time, channels\]"),
    ({"u": ones((2, 5, 3), jnp.int32)}, "u: got int32"),
    ({"order": 0}, "order: got 0"),
    ({"theta": 0.0}, "theta: got 0.0"),
    ({"method": "scan"}, "method: got 'scan'; expected 'chunks', 'fft', 'recurrent' or None"),
    ({"initial_state": ones((2, 3, 5))}, r"initial_state: got .* expected floating \[2, 3, 4\]"),
    ({"segment_ids": ones((2, 4), jnp.int32)}, r"segment_ids: got .* expected integers \[2, 5\]"),
    ({"segment_ids": ones((2, 5), jnp.int32), "method": "fft"}, "segment_ids: method 'fft' knows no"),
]
