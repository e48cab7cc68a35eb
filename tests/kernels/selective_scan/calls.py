"""Calls of selective_scan: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp
import numpy as np

from tests.kernels.draws import document_ids, ones, sizes, wide


def draw(
    rng,
    T,
    D=24,
    N=16,
    B=2,
    whole=False,  # with D, z, dt_bias and softplus; else the recurrence alone, dt >= 0
    state=False,
    packed=False,
    strong=False,  # rates and steps of very different sizes
    dtype="float32",
    **more,
):
    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    f32, spread = wide(dtype), 3.0 if strong else 0.5
    dt = rng.standard_normal((B, T, D)) * spread - 1
    args = {
        "x": normal(B, T, D),
        "dt": (dt if whole else np.exp(dt)).astype(jnp.dtype(dtype)),
        "A": -np.exp(spread * rng.standard_normal((D, N))).astype(f32),
        "B": normal(B, T, N),
        "C": normal(B, T, N),
    }
    if whole:
        args |= {"D": normal(D, dtype=f32), "z": normal(B, T, D), "dt_bias": normal(D, dtype=f32)}
        args |= {"dt_softplus": True}
    if state:
        args["initial_state"] = normal(B, D, N, dtype=f32)
    if packed:
        args["segment_ids"] = document_ids(rng, B, T)
    return args | more


WHOLE = {"whole": True, "state": True, "packed": True}
LIST = [
    {"T": 1, "D": 1, "N": 1, "B": 1, "state": True},
    {"T": 1, "D": 130, "whole": True, "state": True},
    {"T": 7, "D": 1, "N": 4, "whole": True, "packed": True},
    {"T": 33, "N": 1, "strong": True} | WHOLE,
    {"T": 100, "D": 20, "N": 4},
    {"T": 67, "D": 130, "N": 16, "B": 1} | WHOLE,
    {"T": 67, "D": 20, "N": 64, "B": 1, "whole": True, "strong": True},
    {"T": 50, "D": 20, "N": 8, "state": True, "packed": True, "dtype": "bfloat16"},
    {"T": 50, "D": 130, "N": 16, "whole": True, "state": True, "dtype": "bfloat16"},
    {"T": 40, "dtype": "float64"} | WHOLE,
]
RICH = [
    {"T": 131, "D": 130, "N": 5, "B": 1, "strong": True} | WHOLE,
    {"T": 1, "D": 1, "N": 1, "B": 1, "state": True},
    {"T": 50, "D": 20, "N": 8, "state": True, "packed": True, "dtype": "bfloat16"},
]
CASES = {
    "xla": [*RICH, {"T": 9, "dtype": "float64"} | WHOLE, *LIST],
    None: RICH + LIST,  # on CPU "xla", with the gradient by hand
    # Interpreted kernels take seconds to compile: each way through them once.
    "pallas_tpu": [
        {"T": 150, "D": 1, "N": 2, "B": 1, "strong": True} | WHOLE,  # two blocks each way
        {"T": 16, "D": 130, "N": 20, "state": True, "dtype": "bfloat16"},
        {"T": 150, "D": 130, "B": 1, "strong": True} | WHOLE,
        {"T": 50, "D": 20, "N": 20, "B": 1, "state": True, "dtype": "bfloat16"},
        LIST[2],
    ],
    "pallas_gpu": [
        {"T": 20, "D": 130, "N": 2, "B": 1} | WHOLE,  # tiles of 16 tokens, then of 8
        {"T": 11, "D": 20, "N": 1, "B": 2, "dtype": "bfloat16"},
        {"T": 20, "D": 130, "N": 3, "B": 1} | WHOLE,
        {"T": 11, "D": 20, "N": 4, "B": 2, "dtype": "bfloat16"},
    ],
}

DEFINED = [{"T": 9, "D": 5, "N": 3, "strong": True, "whole": True}, {"T": 9, "D": 5, "N": 1, "state": True}]


def has(case: dict) -> set:
    """Return what a kernel has code of its own for: not for more channels, which lie in more tiles."""
    return sizes(case) - {"D > 128"}


B, T, D, N = 2, 6, 4, 3
X, ROWS = ones((B, T, D)), ones((B, T, N))
GOOD = {"x": X, "dt": X, "A": -ones((D, N)), "B": ROWS, "C": ROWS}
WRONG = [
    ({"x": X[0]}, r"x: got float32\[6, 4\]; expected \[batch, time, D\]"),
    ({"x": X[:, :0], "dt": X[:, :0]}, r"x: got float32\[2, 0, 4\]; expected every size >= 1"),
    ({"x": X.astype(int)}, r"x: got int32\[2, 6, 4\]; expected a floating dtype"),
    ({"dt": X[:, :5]}, r"dt: got float32\[2, 5, 4\]; expected \[2, 6, 4\]"),
    ({"dt": X.astype(jnp.complex64)}, r"dt: got complex64.* expected a floating dtype"),
    ({"A": -ones((N, D))}, r"A: got float32\[3, 4\]; expected \[4, N\] \(x's D\)"),
    ({"A": -ones(D)}, r"A: got float32\[4\]; expected \[4, N\] \(x's D\)"),
    ({"A": -ones((D, 0))}, r"A: got float32\[4, 0\]; expected every size >= 1"),
    ({"B": ones((B, T, N + 1))}, r"B: got float32\[2, 6, 4\]; expected \[2, 6, 3\]"),
    ({"C": ROWS.astype(int)}, r"C: got int32\[2, 6, 3\]; expected a floating dtype"),
    ({"D": ones((D, 1))}, r"D: got float32\[4, 1\]; expected \[4\]"),
    ({"z": X[..., :3]}, r"z: got float32\[2, 6, 3\]; expected \[2, 6, 4\]"),
    ({"dt_bias": ones(N)}, r"dt_bias: got float32\[3\]; expected \[4\]"),
    ({"initial_state": ones((B, N, D))}, r"initial_state: got float32\[2, 3, 4\]; expected \[2, 4, 3\]"),
    ({"segment_ids": ones((B, T))}, r"segment_ids: got float32\[2, 6\]; expected integers \[2, 6\]"),
]
CHECKED = [
    ({}, None),
    ({"A": GOOD["A"].at[1, 2].set(0.1)}, "A: a value is positive"),
    ({"dt": X.at[1, 2, 3].set(-0.1)}, "dt: a value is negative"),
    ({"dt": X.at[1, 2, 3].set(-0.1), "dt_softplus": True}, None),
    ({"dt_bias": -2.0 * ones(D)}, "dt: a value is negative"),
]


def states(most):
    """Return the change to one state more than a kernel takes."""
    rows = ones((B, T, most + 1))
    return {"A": -ones((D, most + 1)), "B": rows, "C": rows}


HALF = {name: x.astype(jnp.float16) for name, x in GOOD.items()}
REFUSED = [
    ("pallas_tpu", HALF, "not float16"),
    ("pallas_gpu", HALF, "not float16"),
    ("pallas_tpu", states(128), "N=129: at most 128 states"),
    ("pallas_gpu", states(16), "N=17: at most 16 states"),
]
COMPILED = [
    {"T": 130, "D": 60, "N": 3, "B": 1, "dtype": "bfloat16"} | WHOLE,
    {"T": 130, "D": 60, "N": 4, "B": 1},
    {"T": 1024, "D": 1024, "B": 1, "dtype": "bfloat16"} | WHOLE,
]
