"""Calls of ssd: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp

from tests.kernels.draws import document_ids, ones, wide


def draw(
    rng,
    T,
    G=2,
    H=4,
    P=5,
    N=3,
    B=2,
    skip="h",  # the axes of D
    fused=True,  # with z, dt_bias and softplus
    state=True,
    packed=True,
    dtype="float32",
    **more,
):
    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    f32 = wide(dtype)
    dt = rng.standard_normal((B, T, H)) if fused else rng.uniform(0.01, 1, (B, T, H))
    args = {
        "x": normal(B, T, H, P),
        "dt": dt.astype(f32),
        "A": -rng.uniform(0.1, 2, H).astype(f32),
        "B": normal(B, T, G, N),
        "C": normal(B, T, G, N),
    }
    if skip:
        args["D"] = normal(*{"h": (H,), "hp": (H, P)}[skip], dtype=f32)
    if fused:
        args |= {"z": normal(B, T, H, P), "dt_bias": normal(H, dtype=f32), "dt_softplus": True}
    if state:
        args["initial_state"] = normal(B, H, N, P, dtype=f32)
    if packed:
        args["segment_ids"] = document_ids(rng, B, T)
    return args | more


PLAIN = {"skip": None, "fused": False, "state": False, "packed": False}
CASES = {
    None: [
        {"T": 70, "fused": True, "state": True, "packed": True},
        {"T": 70, "fused": False, "dtype": "bfloat16"},
        {"T": 1, "G": 4, "skip": "hp", "packed": False},
        {"T": 20, "G": 1} | PLAIN,
    ],
    "pallas_tpu": [{"T": 20, "fused": False}],
}

GOOD = {
    "x": ones((2, 6, 4, 5)),
    "dt": ones((2, 6, 4)),
    "A": -ones(4),
    "B": ones((2, 6, 2, 3)),
    "C": ones((2, 6, 2, 3)),
}
WRONG = [
    ({"x": ones((2, 6, 20))}, r"x: got float32\[2, 6, 20\]; expected \[batch, time, heads, P\]"),
    ({"dt": ones((2, 6, 5))}, r"dt: got .* \[2, 6, 4\]"),
    ({"dt": ones((2, 6, 4), jnp.int32)}, r"dt: got int32.* expected a floating dtype"),
    ({"A": -ones((4, 3))}, r"A: got .* expected \[4\] \(x's heads\)"),
    ({"B": ones((2, 6, 3, 3)), "C": ones((2, 6, 3, 3))}, r"B: got .* groups that divide 4"),
    ({"C": ones((2, 6, 2, 4))}, r"C: got .* expected B's shape \[2, 6, 2, 3\]"),
    ({"D": ones(5)}, r"D: got .* expected \[4\] or \[4, 5\]"),
    ({"z": ones((2, 6, 4))}, r"z: got"),
    ({"dt_bias": ones(6)}, r"dt_bias: got .* expected \[4\]"),
    ({"initial_state": ones((2, 4, 5, 3))}, r"initial_state: got .* expected \[2, 4, 3, 5\]"),
    ({"segment_ids": ones((2, 6))}, r"segment_ids: got .* expected integers \[2, 6\]"),
]
CHECKED = [
    ({}, None),
    ({"A": ones(4)}, "A: a value is positive"),
    ({"dt": -ones((2, 6, 4))}, "dt: a value is negative"),
    ({"dt": -ones((2, 6, 4)), "dt_softplus": True}, None),
]
COMPILED = [{"T": 200, "G": 1, "P": 64, "N": 64, "dtype": "bfloat16"}]
