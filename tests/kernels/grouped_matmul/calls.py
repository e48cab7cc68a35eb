"""Calls of grouped_matmul: how one is drawn, and which each backend has to get right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import frugax


def draw(
    rng, sizes, K, N, B=None, T=None, out_rows=None, weighted=False, format=None, dtype="float32", **more
):
    """Rows [B, K] of different sizes, or T tokens and the B rows that read them, and experts."""
    dtype, E = jnp.dtype(dtype), len(sizes)
    B = sum(sizes) if B is None else B
    rows = B if T is None else T
    lhs = rng.standard_normal((rows, K)) * 2 ** rng.uniform(-2, 2, (rows, 1))
    rhs = rng.standard_normal((E, K, N)) * 2 ** rng.uniform(-1, 1, (E, 1, 1))
    rhs = rhs.astype(dtype)
    if format is not None:
        quantize = jax.jit(partial(frugax.formats.quantize, format=format, axis=1))
        rhs = quantize(jnp.asarray(rhs, jnp.float32))
    args = {"lhs": lhs.astype(dtype), "rhs": rhs}
    args["group_sizes"] = np.diff(np.minimum(np.cumsum(sizes), B), prepend=0).astype(np.int32)
    if T is not None:
        args["gather"] = rng.integers(T, size=B).astype(np.int32)
    if out_rows is not None:
        args |= {"scatter": rng.integers(out_rows, size=B).astype(np.int32), "out_rows": out_rows}
    if weighted:
        args["weights"] = rng.uniform(0.2, 1, B).astype(dtype)
    return args | more


ROUTED = {"T": 12, "out_rows": 11, "weighted": True}
PLAIN = [
    {"sizes": [1], "K": 1, "N": 1},
    {"sizes": [3, 0, 7, 0], "K": 9, "N": 5, "B": 13},  # empty groups, rows of none
    {"sizes": [0, 40, 0], "K": 6, "N": 7},  # all rows to one, in two tiles' sizes
    {"sizes": [300, 33, 600, 65], "K": 5, "N": 3, "B": 1000},
    {"sizes": [4, 9, 6], "K": 8, "N": 6} | ROUTED,
    {"sizes": [4, 9, 6], "K": 8, "N": 6, "T": 20, "dtype": "bfloat16"},
    {"sizes": [5, 2], "K": 8, "N": 6, "B": 9, "out_rows": 4, "dtype": "float16"},
]
PACKED = [
    {"sizes": [3, 0, 8], "K": 64, "N": 10, "format": "int4"} | ROUTED,
    {"sizes": [3, 5], "K": 64, "N": 10, "B": 9, "format": "nf4_dq"},
    {"sizes": [3, 5], "K": 64, "N": 10, "format": "nvfp4", "dtype": "bfloat16"},
    {"sizes": [3, 5], "K": 72, "N": 10, "format": "ternary"},
    {"sizes": [3, 5], "K": 50, "N": 10, "format": "uint4"},
    {"sizes": [3, 5], "K": 160, "N": 10, "format": "bitmod4"},
]
FLOAT64 = [case | {"dtype": "float64"} for case in (PLAIN[1], PLAIN[4], PACKED[0])]
ON_GPU = [
    {"sizes": [9, 0, 5], "K": 64, "N": 64, "B": 20, "dtype": "bfloat16"} | ROUTED,
    {"sizes": [3, 0, 5], "K": 256, "N": 128, "B": 9, "format": "int4", "dtype": "bfloat16"},
]
ON_TPU = [
    PLAIN[1],
    {"sizes": [4, 9, 6], "K": 8, "N": 6, "dtype": "bfloat16"} | ROUTED,
    *PACKED[:4],
    {"sizes": [3, 5], "K": 50, "N": 10, "format": "uint4", "dtype": "bfloat16"},
    PLAIN[3],
]
CASES = {
    "reference": FLOAT64,
    "xla": [*PLAIN, *PACKED, *FLOAT64],
    "pallas_gpu": ON_GPU,
    "pallas_tpu": ON_TPU,
    None: [PLAIN[4]],
}
COMPILED = [{"sizes": [700, 0, 300], "K": 256, "N": 256, "B": 1024, "dtype": "bfloat16"}]


def has(case: dict) -> set:
    """Return what backends have code of their own for."""
    given = {"dtype": "float32", "format": None, "B": None} | case
    names = {f"{name} {given[name]}" for name in ("format", "dtype")}
    most = "tiles" if max(case["sizes"]) > 256 else "one tile"
    return (
        names
        | {most, f"rows of none {bool(case.get('M'))}", f"empty {0 in case['sizes']}"}
        | {name for name in ROUTED if name in case}
    )


GOOD = {
    "lhs": np.zeros((6, 4), np.float32),
    "rhs": np.zeros((3, 4, 5), np.float32),
    "group_sizes": np.array([1, 0, 4], np.int32),
    "gather": np.array([0, 1, 2, 3, 4, 5, 0], np.int32),
    "scatter": np.array([0, 1, 0, 1, 0, 1, 2], np.int32),
    "weights": np.zeros(7, np.float32),
    "out_rows": 3,
}
QUANTIZED = jax.eval_shape(
    partial(frugax.formats.quantize, format="int4", axis=2), jax.ShapeDtypeStruct((3, 4, 64), jnp.float32)
)
I32 = partial(np.zeros, dtype=np.int32)
READ = {"scatter": None, "out_rows": None, "weights": None}  # rows that are gathered alone
TWICE = np.where(np.arange(6)[:, None] == GOOD["gather"], np.arange(7, dtype=np.int32), -1)
TWICE[:, -1] = TWICE.max(1)  # the last row of each token once more
WRONG = [
    ({"rhs": np.zeros((4, 5), np.float32)}, r"rhs: got float32\[4, 5\]; expected floats \[E, K, N\]"),
    ({"rhs": QUANTIZED}, r"rhs: got int4\[3, 4, 64\] in groups along axis -1; expected .* along axis -2"),
    ({"rhs": np.zeros((3, 4, 5), np.float16)}, "rhs: got float16.*; expected lhs's dtype float32"),
    ({"lhs": np.zeros((6, 5), np.float32)}, r"lhs: got float32\[6, 5\]; expected floats \[rows, 4\]"),
    ({"lhs": np.zeros((6, 4), np.int32)}, "lhs: got int32"),
    ({"lhs": np.zeros((0, 4), np.float32)}, "lhs: got .*; expected every size >= 1"),
    ({"group_sizes": np.array([1, 5], np.int32)}, r"group_sizes: got int32\[2\]; expected integers \[3\]"),
    ({"group_sizes": np.ones(3, np.float32)}, "group_sizes: got float32"),
    ({"gather": I32((7, 1))}, r"gather: got int32\[7, 1\]; expected integers"),
    ({"scatter": I32(6)}, r"scatter: got int32\[6\]; expected integers \[7\]"),
    ({"out_rows": None}, r"out_rows: got None and scatter \[7\]; expected both or neither"),
    ({"scatter": None}, "out_rows: got 3 and scatter none"),
    ({"out_rows": 0}, "out_rows: got 0; expected a number of rows >= 1"),
    ({"scatter": None, "out_rows": None}, r"weights: got float32\[7\]; expected None without scatter"),
    ({"rows_of": I32((6, 2))}, r"rows_of: got .*; expected as many rows of lhs as out_rows, got \[6, 3\]"),
    (READ | {"rows_of": I32((5, 2))}, r"rows_of: got int32\[5, 2\]; expected integers \[6, most rows"),
    (
        READ | {"rows_of": I32((6, 2)), "gather": None},
        "rows_of: .*; expected None without gather and scatter",
    ),
    ({"weights": I32(7)}, r"weights: got int32\[7\]; expected floats \[7\]"),
]
VALUES = [  # an error outside of jit, where values are seen
    ({"group_sizes": np.array([4, 0, 4], np.int32)}, r"group_sizes: got \[4, 0, 4\]; .* 7 rows at most"),
    ({"group_sizes": np.array([4, -1, 1], np.int32)}, "group_sizes: got .*; expected sizes >= 0"),
    ({"gather": I32(7) + 6}, "gather: got 6 to 6; expected 0 to 6 - 1"),
    ({"rows_of": I32((6, 2))} | READ, "rows_of: a row of a token is left out, .*; expected each once"),
    ({"rows_of": TWICE} | READ, "rows_of: a row of a token is left out, repeated or another's"),
    ({"scatter": I32(7) - 1}, "scatter: got -1 to -1; expected 0 to 3 - 1"),
]
HALF = {"lhs": np.zeros((6, 4), np.float16), "rhs": np.zeros((3, 4, 5), np.float16)}
REFUSED = [("pallas_gpu", {}, "not float32"), ("pallas_tpu", HALF, "not float16")]
CHECKED = [({}, None), *((change, f"{next(iter(change))}: a ") for change, _ in VALUES)]
