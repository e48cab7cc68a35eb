"""Calls of trapezoidal_ssd: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp

import frugax
from tests.kernels.draws import document_ids, ones, wide


def draw(rng, T, G=2, H=4, P=5, N=3, B=2, state=True, packed=True, skip=True, dtype="float32", **more):
    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    def uniform(low, high):
        return rng.uniform(low, high, (B, T, H)).astype(wide(dtype))

    args = {
        "x": normal(B, T, H, P),
        "dt": uniform(0.01, 1),
        "A": uniform(-2, -0.1),
        "B": normal(B, T, G, N),
        "C": normal(B, T, G, N),
        "mix": uniform(0, 1),
    }
    if skip:
        args["D"] = normal(H, dtype=wide(dtype))
    if state:
        memory = normal(B, H, N, P, dtype=wide(dtype))
        args["initial_state"] = frugax.kernels.TrapezoidalState(memory, normal(B, G, N), normal(B, H, P))
    if packed:
        args["segment_ids"] = document_ids(rng, B, T)
    return args | more


CASES = {
    None: [
        {"T": 70, "state": True, "packed": True},
        {"T": 1, "skip": False},
        {"T": 20, "G": 1, "state": False, "packed": False},
    ],
    "pallas_tpu": [{"T": 20}],
}

ROWS = ones((2, 6, 4))
GOOD = {
    "x": ones((2, 6, 4, 5)),
    "dt": ROWS,
    "A": -ROWS,
    "B": ones((2, 6, 2, 3)),
    "C": ones((2, 6, 2, 3)),
    "mix": 0.5 * ROWS,
}
WRONG = [
    ({"mix": ones((2, 6))}, "mix: got"),
    ({"A": -ones(4)}, "A: got"),
    ({"dt": ones((2, 6, 3))}, "dt: got"),
    ({"C": ones((2, 6, 2, 4))}, "C: got"),
]
CHECKED = [
    ({}, None),
    ({"A": GOOD["A"].at[1, 2, 3].set(0.1)}, "A: a value is positive"),
    ({"dt": ROWS.at[1, 2, 3].set(-0.1)}, "dt: a value is negative"),
]
