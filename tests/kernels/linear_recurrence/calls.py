"""Calls of linear_recurrence: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp
import numpy as np

from tests.kernels.draws import document_ids, ones, wide


def draw(
    rng,
    T,
    D=60,
    B=2,
    strongest=None,  # a lies between it and its negative; None: between 0 and 1, as gates do
    state=False,
    packed=False,
    dtype="float32",
    a_dtype=None,  # None: dtype
    **more,
):
    shape = (B, T, D)
    gates = 1 / (1 + np.exp(-rng.normal(1, 2, shape)))
    a = gates if strongest is None else rng.uniform(-strongest, strongest, shape)
    args = {
        "a": a.astype(jnp.dtype(a_dtype or dtype)),
        "b": rng.standard_normal(shape).astype(jnp.dtype(dtype)),
    }
    if state:
        args["initial_state"] = rng.standard_normal((B, D)).astype(wide(dtype))
    if packed:
        args["segment_ids"] = document_ids(rng, B, T)
    return args | more


PACKED = {"state": True, "packed": True}
BACK = {"state": True, "reverse": True}
LIST = [
    {"T": 1, "D": 1, "B": 1, "state": True},
    {"T": 1, "D": 200} | BACK,
    {"T": 7, "D": 1} | PACKED,
    {"T": 7, "D": 200} | BACK,
    {"T": 63, "strongest": 1.3} | PACKED,
    {"T": 130, "B": 1, "strongest": 1.3},
    {"T": 130, "D": 200, "strongest": 1.3, "packed": True} | BACK,
    {"T": 130, "D": 129, "B": 3, "state": True},
    {"T": 63, "dtype": "bfloat16"} | PACKED,
    {"T": 130, "D": 200, "dtype": "bfloat16"} | BACK,
    {"T": 63, "D": 60, "state": True, "dtype": "bfloat16", "a_dtype": "float32"},
]
RICH = [
    {"T": 130, "D": 200, "strongest": 1.3, "packed": True} | BACK,
    {"T": 63, "D": 60, "B": 1, "dtype": "bfloat16", "a_dtype": "float32"} | PACKED,
    {"T": 1, "D": 1, "B": 1, "state": True},
    {"T": 7, "dtype": "bfloat16", "reverse": True},
]
FLOAT64 = [case | {"dtype": "float64"} for case in LIST[2:8]]
CASES = {
    "reference": FLOAT64,
    "xla": [*RICH, FLOAT64[0], *LIST, *FLOAT64],
    "pallas_tpu": RICH + LIST,
    # A GPU's tiles of 32 tokens and 128 channels are interpreted slowly: few cases, each with several turns.
    "pallas_gpu": [
        {"T": 70, "D": 130, "B": 1, "strongest": 1.3} | PACKED,
        {"T": 40, "D": 60, "B": 2, "dtype": "bfloat16", "a_dtype": "float32", "packed": True} | BACK,
        LIST[0],
        {"T": 70, "D": 60, "strongest": 1.3, "packed": True} | BACK,
        {"T": 40, "D": 60, "B": 1, "state": True, "dtype": "bfloat16"},
        {"T": 40, "D": 60, "B": 1, "reverse": True, "dtype": "bfloat16", "a_dtype": "float32"},
    ],
    None: [{"T": 130, "packed": True} | BACK, {"T": 7, "dtype": "bfloat16"} | PACKED],
}

B, T, D = 2, 6, 4
GOOD = {"a": ones((B, T, D)), "b": ones((B, T, D))}
WRONG = [
    ({"a": ones((B, T))}, r"a: got float32\[2, 6\]; expected \[batch, time, D\]"),
    ({"b": ones((B, T, D + 1))}, r"b: got float32\[2, 6, 5\]; expected a's shape \[2, 6, 4\]"),
    ({"b": ones((B, T, D), jnp.int32)}, r"b: got int32.* expected a floating dtype"),
    ({"a": ones((B, T, D), jnp.complex64)}, r"a: got complex64.* expected a floating dtype"),
    ({"a": ones((B, 0, D)), "b": ones((B, 0, D))}, r"a: got .* expected every size >= 1"),
    ({"initial_state": ones((B, T, D))}, r"initial_state: got .* expected \[2, 4\]"),
    ({"initial_state": ones((B, D), jnp.int32)}, r"initial_state: got int32.* expected a floating dtype"),
    ({"segment_ids": ones((B, T))}, r"segment_ids: got float32\[2, 6\]; expected integers \[2, 6\]"),
    ({"segment_ids": ones((B, T + 1), jnp.int32)}, r"segment_ids: got"),
]
HALF = {name: x.astype(jnp.float16) for name, x in GOOD.items()}
REFUSED = [("pallas_tpu", HALF, "not float16"), ("pallas_gpu", HALF, "not float16")]
COMPILED = [
    {"T": 130, "B": 1} | BACK,
    {"T": 2048, "D": 1024, "state": True, "dtype": "bfloat16"},
]
