"""Calls of selective_scan_2d: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp
import numpy as np

from tests.kernels.draws import ones

from .definition import visits


def draw(rng, size, scan="cross", step=2, B=2, D=5, N=3, dtype="float32", **more):
    paths = visits(*size, scan, step)
    P, T = len(paths), len(paths[0])

    def normal(*shape):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    args = {
        "x": normal(B, *size, D),
        "dt": normal(P, B, T, D),
        "A": -np.exp(normal(P, D, N)),
        "B": normal(P, B, T, N),
        "C": normal(P, B, T, N),
        "D": normal(P, D),
        "dt_bias": normal(P, D),
    }
    return args | {"scan": scan, "step": step, "dt_softplus": True} | more


SCANS = [{"scan": "cross"}, {"scan": "atrous"}, {"scan": "atrous", "step": 3}]
CASES = {
    None: [
        {"size": (4, 6), "scan": "cross"},
        {"size": (5, 3), "scan": "atrous"},
        {"size": (1, 4), "scan": "atrous", "step": 3},
        *({"size": size} | scan for size in ((4, 6), (5, 3), (1, 4)) for scan in SCANS),
    ],
    "pallas_tpu": [{"size": (3, 5), "scan": "cross"}],
}

GOOD = draw(np.random.default_rng(0), (4, 6))
WRONG = [
    ({"scan": "spiral"}, "scan: got 'spiral'; expected 'cross' or 'atrous'"),
    ({"step": 0}, "step: got 0; expected an integer >= 1"),
    ({"x": ones((4, 6, 5))}, r"x: got float32\[4, 6, 5\]; expected \[batch, height, width, D\]"),
    (
        {"A": -ones((3, 5, 3))},
        r"A: got float32\[3, 5, 3\]; expected a first axis of 4, one for each path",
    ),
    ({"dt": ones((4, 2, 23, 5))}, r"dt: got .*; expected \[4, 2, 24\] and its channels"),
    ({"dt": ones((3, 2, 24, 5))}, "dt: got"),
    ({"B": ones((4, 2, 24, 2))}, r"B: got float32\[2, 24, 2\]; expected \[2, 24, 3\]"),
]


def last(name, value):
    """Return the change to a value in the last path alone."""
    array = abs(GOOD[name]) if name == "dt" else GOOD[name].copy()
    array[-1] = value
    return {name: array, "dt_bias": None}


CHECKED = [
    (last("A", 0.1) | {"dt": abs(GOOD["dt"])}, "A: a value is positive"),
    (last("dt", -0.1) | {"dt_softplus": False}, "dt: a value is negative"),
    (last("dt", -0.1), None),
]
