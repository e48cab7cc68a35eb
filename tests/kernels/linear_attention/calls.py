"""Calls of linear_attention: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp
import numpy as np

from tests.kernels.draws import document_ids, wide


def draw(
    rng,
    T,
    heads=(2, 2, 2),  # of q, k, v
    K=16,
    V=24,
    B=2,
    decay=None,  # the axes of log_decay: "h", "bth" or "bthk"
    mildest=-0.01,
    strongest=-0.5,
    bonus=False,
    state=False,
    packed=False,
    dtype="float32",
    feature_map=None,
    **more,
):
    more |= {} if feature_map is None else {"feature_map": feature_map}
    rows = K if feature_map is None else 1 + K + K * (K + 1) // 2  # of the state
    H, f32 = max(heads), wide(dtype)
    shapes = zip("qkv", heads, (K, K, V), strict=True)
    args = {n: rng.standard_normal((B, T, h, width)).astype(jnp.dtype(dtype)) for n, h, width in shapes}
    if decay:
        shape = {"h": (H,), "bth": (B, T, H), "bthk": (B, T, H, K)}[decay]
        # Evenly spread on a log scale: strong and mild gates side by side.
        args["log_decay"] = (-np.exp(rng.uniform(np.log(-mildest), np.log(-strongest), shape))).astype(f32)
    if bonus:
        args["bonus"] = rng.standard_normal((H, K)).astype(f32)
    if state:
        args["initial_state"] = rng.standard_normal((B, H, rows, V)).astype(f32)
    if packed:
        args["segment_ids"] = document_ids(rng, B, T)
    return args | more


def has(case: dict) -> set:
    """Return what a kernel has code of its own for."""
    decay, heads = case.get("decay"), case.get("heads", (2, 2, 2))
    strong = {f"strong {decay}"} if case.get("strongest", 0) < -1 and decay != "h" else set()
    groups = {"fewer k, v" if heads[0] > heads[2] else "fewer q, k"} if len(set(heads)) > 1 else set()
    flags = {name for name in ("bonus", "state", "packed", "feature_map", *MORE) if case.get(name)}
    size = {"one token"} if case["T"] == 1 else {f"K = {case.get('K')}"}
    return flags | strong | groups | size | {f"decay {decay}", case.get("dtype", "float32")}


MORE = ("lengths", "segment_states", "reverse")
EVERYTHING = {"decay": "bthk", "bonus": True, "state": True, "packed": True, "heads": (4, 2, 2)}
TAYLOR = {"feature_map": "taylor"}
STRONG = {"mildest": -1e-4, "strongest": -50}
RICH = [
    {"T": 130} | EVERYTHING | STRONG,
    {"T": 100, "decay": "bth", "heads": (1, 1, 4), "scale": 1.0, "state": True, "packed": True} | STRONG,
    {"T": 63, "decay": "h", "state": True, "packed": True},
    {"T": 70, "heads": (4, 2, 2), "state": True, "packed": True} | TAYLOR,
    {"T": 1, "decay": "bth", "bonus": True, "state": True},
]
LONG = [
    {"T": 1, "decay": "bth", "state": True},
    {"T": 7},
    {"T": 63, "decay": "h", "state": True},
    {"T": 64, "decay": "bth", "packed": True},
    {"T": 130, "decay": "bth", "state": True, "packed": True, "heads": (4, 2, 2)},
    {"T": 100, "decay": "bth", "heads": (1, 1, 4), "scale": 1.0},  # Mamba-2's groups
    {"T": 70, "decay": "bthk", "state": True},
    {"T": 130, "decay": "bthk", "state": True, "packed": True, "heads": (4, 2, 2)},
    {"T": 65, "decay": "bthk", "bonus": True, "state": True, "packed": True},
    {"T": 40, "decay": "bth", "bonus": True},
    {"T": 150, "decay": "bthk"} | STRONG,
    {"T": 150, "decay": "bth", "packed": True} | STRONG,
    {"T": 100, "decay": "bth", "lengths": [100, 71]} | TAYLOR,
    {"T": 50, "decay": "h", "mildest": -40, "strongest": -50, "state": True},
]
TAYLOR_ON_GPU = [
    {"T": 70, "heads": (4, 2, 2), "state": True, "packed": True} | TAYLOR,
    {"T": 150, "heads": (1, 1, 2), "lengths": [140], "scale": 1.0} | TAYLOR,
    {"T": 65, "state": True, "reverse": True} | TAYLOR,
]


def sized(cases, sizes, **more):
    """Return the cases with (K, V) of each size in turn."""
    return [c | {"K": K, "V": V} | more for c, (K, V) in zip(cases, sizes * 7, strict=False)]


CASES = {
    "xla": sized(RICH, [(16, 24), (5, 1)])
    + sized(LONG, [(16, 24), (5, 1), (16, 8)])
    + sized([LONG[5], LONG[7]], [(16, 24)], dtype="bfloat16"),
    "pallas_tpu": [
        *sized(RICH, [(16, 24)]),
        {"T": 63, "decay": "h", "state": True, "K": 128, "V": 60, "dtype": "bfloat16"},
        *sized(LONG, [(16, 24), (128, 60)]),
        *sized(LONG[3:9], [(128, 60), (16, 24)], dtype="bfloat16"),
    ],
    "pallas_gpu": [
        *sized([c for c in RICH + LONG if "feature_map" not in c], [(64, 64)], B=1, dtype="bfloat16"),
        *sized(TAYLOR_ON_GPU, [(5, 24), (16, 65)], B=1, dtype="bfloat16"),
    ],
    None: sized(RICH[:1], [(5, 24)]),
}

DEFINED = [
    {"T": 9, "K": 4, "V": 3, "decay": "bth", "bonus": True, "heads": (1, 1, 4), "scale": 0.3},
    {"T": 9, "K": 4, "V": 3, "decay": "bthk"} | STRONG,
    {"T": 9, "K": 4, "V": 3, "decay": "h", "state": True},
    {"T": 9, "K": 2, "V": 3, "decay": "bth", "state": True} | TAYLOR,
    {"T": 9, "K": 4, "V": 3},
]

B, T, H, K, V = 2, 6, 4, 3, 5
GOOD = {"q": jnp.ones((B, T, H, K)), "k": jnp.ones((B, T, H, K)), "v": jnp.ones((B, T, H, V))}
WRONG = [
    ({"q": jnp.ones((B, T, K))}, r"q: got float32\[2, 6, 3\]; expected \[batch, time, heads, K\]"),
    ({n: x[:, :0] for n, x in GOOD.items()}, r"q: got .* expected every size >= 1"),
    ({"k": jnp.ones((B, T, H, K + 1))}, r"k: got .*4\]; expected \[2, 6, heads, 3\]"),
    ({"k": jnp.ones((B, T + 1, H, K))}, r"k: got"),
    ({"v": jnp.ones((B + 1, T, H, V))}, r"v: got"),
    ({"k": jnp.ones((B, T, 3, K))}, r"k: .* expected a number of heads that divides 4"),
    ({"q": jnp.ones((B, T, H, K), jnp.int32)}, r"q: got int32.* expected a floating dtype"),
    ({"v": jnp.ones((B, T, H, V), jnp.bfloat16)}, r"v: got bfloat16.* expected q's dtype float32"),
    (
        {"log_decay": -jnp.ones((B, T))},
        r"log_decay: got .* expected None, \[4\], \[2, 6, 4\] or \[2, 6, 4, 3\]",
    ),
    ({"log_decay": -jnp.ones((3,))}, r"log_decay: got"),
    ({"log_decay": -jnp.ones((B, T, H, V))}, r"log_decay: got"),
    ({"log_decay": -jnp.ones((B, T, H), jnp.int32)}, r"log_decay: got int32"),
    ({"bonus": jnp.ones((K,))}, r"bonus: got .* expected \[4, 3\]"),
    ({"initial_state": jnp.ones((B, H, V, K))}, r"initial_state: got .* expected \[2, 4, 3, 5\]"),
    (TAYLOR | {"bonus": jnp.ones((H, K))}, r"bonus: got .* expected None with a feature_map"),
    (TAYLOR | {"log_decay": -jnp.ones((B, T, H, K))}, r"log_decay: got .* \[2, 6, 4\] with a feature_map"),
    ({"segment_ids": jnp.ones((B, T))}, r"segment_ids: got .* expected integers \[2, 6\]"),
    ({"segment_ids": jnp.ones((B, T + 1), jnp.int32)}, r"segment_ids: got"),
]
DECAY = -jnp.ones((B, T, H))
CHECKED = [
    ({"log_decay": DECAY}, None),
    ({"log_decay": DECAY.at[1, 2, 3].set(0.1)}, "log_decay: a value is positive"),
]
REFUSED = [("pallas_gpu", {}, "bfloat16")]  # wgmma takes no float32

BF16 = {"dtype": "bfloat16", "B": 1}
FULL = {"state": True, "packed": True, "bonus": True} | BF16
WIDE = {"T": 256, "heads": (1, 1, 1), "K": 128, "V": 128} | BF16
ON_TPU = [
    {"T": 100, "decay": "bthk", "K": 64, "V": 100, "heads": (1, 1, 1)} | FULL,
    {"T": 300, "decay": "bth", "K": 60, "V": 24, "heads": (2, 1, 1)} | FULL,
    WIDE,
    WIDE | {"decay": "bth"},
    WIDE | {"decay": "bthk"},
    WIDE | {"T": 1, "decay": "h", "K": 64, "V": 64},
    WIDE | {"T": 130, "decay": "bthk", "dtype": "float32"},
    WIDE | {"T": 129, "decay": "bth", "K": 256, "V": 256},
    WIDE | {"T": 200, "decay": "bth", "heads": (1, 1, 4), "V": 64},  # Mamba-2's groups
    {"T": 200, "heads": (16, 16, 16), "K": 16, "V": 65} | TAYLOR | BF16,  # Based
    {"T": 40, "heads": (2, 1, 1), "K": 16, "V": 65, "decay": "bth", "packed": True} | TAYLOR,
    {"T": 64, "heads": (8, 8, 8), "K": 256, "V": 384} | BF16,
    {"T": 256, "heads": (8, 8, 8), "K": 256, "V": 512, "decay": "bthk"} | BF16,
]
WGMMA = {"B": 2, "T": 192, "heads": (4, 4, 4), "K": 128, "V": 128, "dtype": "bfloat16"}
ON_GPU = [
    WGMMA | {"decay": "bthk", "K": 64, "V": 64, "heads": (4, 2, 2), "T": 2} | FULL,
    WGMMA | {"decay": "bth", "K": 256, "V": 256, "heads": (1, 1, 4)} | FULL,
    WGMMA | {"K": 64, "V": 64},
    WGMMA | {"decay": "h", "V": 64, "T": 100},
    WGMMA | {"decay": "bthk", "K": 256, "V": 256},
    WGMMA | {"decay": "bthk", "K": 80, "V": 40},
]
