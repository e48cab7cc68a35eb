"""Calls of causal_conv1d: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp
import numpy as np

from tests.kernels.draws import ones


def draw(
    rng,
    T,
    D,
    W,
    B=2,
    bias=True,
    activation="silu",
    state=False,
    packed=False,
    dtype="float32",
    weight_dtype=None,  # None: dtype
    **more,
):
    def normal(*shape, dtype=dtype):
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    args = {"x": normal(B, T, D), "weight": normal(W, D, dtype=weight_dtype or dtype)}
    args["activation"] = activation
    if bias:
        args["bias"] = normal(D, dtype=weight_dtype or dtype)
    if state:
        args["initial_state"] = normal(B, W - 1, D)
    if packed:  # documents of 1..8 tokens, and ids that come back
        rows = [np.repeat(rng.integers(0, 3, T), rng.integers(1, 9, T))[:T] for _ in range(B)]
        args["segment_ids"] = np.stack(rows).astype(np.int32)
        args["segment_ids"][0, : T // 2] = 1  # one long enough to cross a block of any kernel
    return args | more


PACKED = {"state": True, "packed": True}
PLAIN = {"bias": False, "activation": None}
LIST = [
    {"T": 1, "D": 60, "W": 4, "state": True},
    {"T": 2, "D": 200, "W": 5} | PACKED,
    {"T": 7, "D": 1, "W": 2, "bias": False, "state": True},
    {"T": 65, "D": 60, "W": 1, "packed": True},
    {"T": 65, "D": 200, "W": 4, "state": True},
    {"T": 130, "D": 60, "W": 4} | PACKED,
    {"T": 130, "D": 200, "W": 5, "packed": True} | PLAIN,
    {"T": 7, "D": 60, "W": 5, "activation": None},
    {"T": 130, "D": 1, "W": 4},
]
NARROW = [LIST[5] | {"dtype": "bfloat16"}, LIST[4] | {"dtype": "bfloat16", "weight_dtype": "float32"}]
RICH = [
    {"T": 130, "D": 200, "W": 5} | PACKED,
    {"T": 7, "D": 1, "W": 1, "packed": True} | PLAIN,
    {"T": 1, "D": 60, "W": 4, "state": True, "dtype": "bfloat16", "weight_dtype": "float32"},
]
FLOAT64 = [case | {"dtype": "float64"} for case in (LIST[1], LIST[5])]
CASES = {
    "reference": FLOAT64,
    "xla": [*RICH, FLOAT64[0], *LIST, *NARROW, FLOAT64[1]],
    "pallas_tpu": RICH + LIST + NARROW,
    "pallas_gpu": [{"T": 70, "D": 130, "W": 2} | PACKED, *RICH, *LIST, *NARROW],
    None: [LIST[5], NARROW[0]],
}

GOOD = {"x": ones((2, 8, 6)), "weight": ones((4, 6))}
WRONG = [
    ({"x": ones((2, 8))}, "x: got .* expected "),
    ({"x": ones((2, 0, 6))}, "x: got .* expected "),
    ({"x": ones((2, 8, 6), int)}, "x: got .* expected "),
    ({"weight": ones((4, 5))}, "weight: got .* expected "),
    ({"weight": ones((0, 6))}, "weight: got .* expected "),
    ({"weight": ones((4, 6), int)}, "weight: got .* expected "),
    ({"bias": ones(5)}, "bias: got .* expected "),
    ({"bias": ones(6, int)}, "bias: got .* expected "),
    ({"initial_state": ones((2, 4, 6))}, "initial_state: got .* expected "),
    ({"initial_state": ones((2, 3, 6), int)}, "initial_state: got .* expected "),
    ({"segment_ids": ones((2, 7), int)}, "segment_ids: got .* expected "),
    ({"segment_ids": ones((2, 8))}, "segment_ids: got .* expected "),
    ({"activation": "relu"}, "activation: got .* expected "),
]
NARROW_X = {"dtype": "bfloat16", "weight_dtype": "float32"}
COMPILED = [
    {"T": 1000, "D": 200, "W": 5} | PACKED,
    {"T": 2048, "D": 1024, "W": 4} | NARROW_X,
    {"T": 1, "D": 256, "W": 2} | NARROW_X | PACKED,
    {"T": 100, "D": 60, "W": 1, "B": 1},
]
ON_GPU = [*COMPILED, {"T": 300, "D": 256, "W": 16, "B": 1, "dtype": "bfloat16"} | PACKED]
