"""Calls of rnn: how one is drawn, and which each backend has to get right."""

import jax.numpy as jnp
import numpy as np

from tests.kernels.draws import document_ids, ones, wide

from .definition import CELLS


def draw(rng, cell, B, T, H, D, bias=True, state=False, packed=False, dtype="float32", **more):
    _, G, S = CELLS[cell]

    def normal(*shape, times=1.0):
        return (times * rng.standard_normal(shape)).astype(jnp.dtype(dtype))

    args = {
        "gates": normal(B, T, H, G, D),
        "recurrent": normal(H, G, D, D, times=0.7 / D**0.5),
        "cell": cell,
    }
    if bias:
        args["bias"] = normal(H, G, D)
    if state:
        args["initial_state"] = rng.standard_normal((B, S, H, D)).astype(wide(dtype))
        if cell == "slstm":
            args["initial_state"][:, 2] = 1 + np.abs(args["initial_state"][:, 2])
    if packed:
        args["segment_ids"] = document_ids(rng, B, T)
    return args | more


PACKED = {"state": True, "packed": True}
LIST = [
    *({"cell": cell, "B": 2, "T": 9, "H": 3, "D": 7} | PACKED for cell in CELLS),
    {"cell": "lstm", "B": 3, "T": 1, "H": 1, "D": 5, "state": True},
    {"cell": "gru", "B": 1, "T": 40, "H": 2, "D": 33, "bias": False},
    {"cell": "elman", "B": 9, "T": 12, "H": 1, "D": 1},
    {"cell": "slstm", "B": 1, "T": 40, "H": 1, "D": 20, "bias": False},
    *({"cell": c, "B": 3, "T": 12, "H": 2, "D": 24, "dtype": "bfloat16"} | PACKED for c in ("gru", "slstm")),
]
BF16 = {"dtype": "bfloat16"}
FLOAT64 = [case | {"dtype": "float64"} for case in LIST[:4]]
# Kernels pad to 128 channels and 8 or 16 sequences, and are interpreted slowly: few cases, each of odd sizes.
CASES = {
    "xla": [
        *LIST[:4],
        {"cell": "lstm", "B": 1, "T": 1, "H": 1, "D": 1, "bias": False, "state": True},
        *LIST,
        *FLOAT64,
    ],
    "pallas_tpu": [
        *({"cell": cell, "B": 3, "T": 5, "H": 2, "D": 7} | PACKED for cell in CELLS),
        {"cell": "lstm", "B": 9, "T": 70, "H": 1, "D": 5, "bias": False},  # two blocks of time
        *({"cell": c, "B": 2, "T": 5, "H": 1, "D": 130, "state": True} | BF16 for c in ("lstm", "gru")),
        {"cell": "gru", "B": 1, "T": 1, "H": 2, "D": 3} | PACKED,
        {"cell": "elman", "B": 1, "T": 1, "H": 1, "D": 3, "state": True},  # as many tokens as heads
    ],
    "pallas_gpu": [
        *({"cell": cell, "B": 3, "T": 5, "H": 2, "D": 7} | BF16 | PACKED for cell in CELLS),
        {"cell": "lstm", "B": 18, "T": 4, "H": 1, "D": 70} | BF16,  # two blocks of sequences, two of channels
        {"cell": "gru", "B": 1, "T": 1, "H": 2, "D": 3, "state": True, "bias": False} | BF16,
    ],
    None: [LIST[3], LIST[8], *LIST[:3]],
}

DEFINED = [{"cell": cell, "B": 2, "T": 5, "H": 2, "D": 3} | PACKED for cell in CELLS if cell != "lstm"]
DEFINED += [{"cell": "slstm", "B": 2, "T": 5, "H": 2, "D": 3, "bias": False}]

B, T, H, D = 2, 6, 3, 4
GOOD = {"gates": ones((B, T, H, 4, D)), "recurrent": ones((H, 4, D, D))}
INTS = jnp.int32
WRONG = [
    (
        {"gates": ones((B, T, H, D))},
        r"gates: got float32\[2, 6, 3, 4\]; expected \[batch, time, heads, 4, D\]",
    ),
    ({"gates": ones((B, T, H, 3, D))}, r"gates: got .* \(of 4 gates: cell='lstm'\)"),
    ({"gates": ones((B, T, H, 4, D), INTS)}, r"gates: got int32.* expected a floating dtype"),
    ({"gates": ones((B, 0, H, 4, D))}, r"gates: got .* expected every size >= 1"),
    ({"recurrent": ones((H, 4, D, D + 1))}, r"recurrent: got .* expected \[3, 4, 4, 4\]"),
    ({"recurrent": ones((H, 4, D, D), jnp.bfloat16)}, r"recurrent: got bfloat16.* gates' dtype float32"),
    ({"bias": ones((4, H, D))}, r"bias: got float32\[4, 3, 4\]; expected \[3, 4, 4\]"),
    ({"initial_state": ones((B, H, D))}, r"initial_state: got .* expected \[2, 2, 3, 4\] \(h, c\)"),
    ({"initial_state": ones((B, 2, H, D), INTS)}, r"initial_state: got int32.* a floating dtype"),
    ({"segment_ids": ones((B, T))}, r"segment_ids: got float32\[2, 6\]; expected integers \[2, 6\]"),
    ({"cell": "rnn"}, r"cell: got 'rnn'; expected one of 'lstm', 'gru', 'elman', 'slstm'"),
]


def heads(size):
    """Return the change to one head of `size` channels."""
    shapes = {"gates": (2, 9, 1, 4, size), "recurrent": (1, 4, size, size)}
    return {name: np.broadcast_to(np.zeros((), jnp.bfloat16), shape) for name, shape in shapes.items()}


TOO_LARGE = "heads of {} channels with 4 gates take at least .* bytes of {}"
REFUSED = [
    ("pallas_tpu", {name: x.astype(jnp.float16) for name, x in GOOD.items()}, "not float16"),
    ("pallas_gpu", {}, "the GPU kernel's products are bfloat16's, not float32's"),
    ("pallas_tpu", heads(4096), TOO_LARGE.format(4096, "VMEM, 50,331,648 are")),
    ("pallas_gpu", heads(256), TOO_LARGE.format(256, "shared memory")),
]


def compiled(cell, B, T, H, D, dtype="bfloat16", packed=True):
    return {"cell": cell, "B": B, "T": T, "H": H, "D": D, "dtype": dtype, "state": True, "packed": packed}


ON_TPU = [
    compiled("lstm", 3, 70, 2, 100),
    compiled("slstm", 2, 9, 1, 256, "float32", False),
    compiled("slstm", 1, 33, 2, 200),
    compiled("lstm", 16, 64, 1, 640, packed=False),
    compiled("gru", 9, 40, 2, 64),
    compiled("elman", 4, 20, 1, 128, "float32"),
]
# The largest heads that each cell's kernels take, with the fullest registers.
ON_GPU = [
    compiled("slstm", 5, 33, 2, 100),
    compiled("lstm", 5, 33, 2, 128, packed=False),
    compiled("gru", 5, 33, 2, 128),
    compiled("elman", 5, 33, 2, 256),
]
