"""The GPU kernel, interpreted, and the places of bytes in registers, which an interpreter does not see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.kernels.quantized_matmul import OPERATION, quantized_matmul
from frugax.kernels.quantized_matmul.inputs import check
from frugax.kernels.quantized_matmul.pallas_gpu import registers
from frugax.kernels.quantized_matmul.pallas_gpu.tiling import tiling
from tests.errors import assert_close
from tests.seeds import generator

full = pytest.mark.full
CASES = [
    ("uint4", dict(M=9, group=64, dtype="float16", bias=True)),  # zeros
    ("nvfp4", dict(M=3)),  # coded scales, looked-up values
    ("int3", dict(M=2, K=512, group=128)),  # two planes; a sum in two parts
    ("int8", dict(M=3, activations="int8", bias=True)),  # sums in int32
    ("fp8_e4m3", dict(M=3, group=128, activations="fp8_e4m3")),
    *(
        pytest.param(name, sizes, marks=full)
        for name, sizes in (
            ("int2", dict(M=1, group=256)),
            ("int4", dict(M=3, group=64, activations="int8")),
            ("int5", dict(M=5, group=16)),
            ("uint7", dict(M=5, group=64)),
            ("uint8", dict(M=5, K=384, group=128)),
            ("int4", dict(M=130, K=512, N=256, group=512, bias=True)),
            ("int4", dict(M=5, K=192)),  # blocks of 64 codes
            ("ternary", dict(M=5)),
            ("bipolar6", dict(M=5, group=64)),
            ("nf4_dq", dict(M=5, group=64)),
            ("mxfp4", dict(M=5, dtype="float16")),
            ("mxfp6_e3m2", dict(M=5)),
            ("mxfp8_e5m2", dict(M=5)),
            ("ternary", dict(M=5, activations="int8")),
            ("int6", dict(M=70, group=128, activations="int8")),
        )
    ),
]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_the_product_and_its_gradient_are_the_definitions(name, sizes):
    sizes = dict(M=1, K=256, N=128, group=None, dtype="bfloat16", bias=False, activations=None) | sizes
    M, K, N, dtype = (sizes[key] for key in ("M", "K", "N", "dtype"))
    rng = generator(1)
    quantize = jax.jit(partial(frugax.formats.quantize, format=name, group_size=sizes["group"]))
    w = quantize(jnp.asarray(rng.standard_normal((K, N)), jnp.float32))
    x, dy, b = (rng.standard_normal(s).astype(jnp.dtype(dtype)) for s in ((M, K), (M, N), (N,)))

    def both(x, dy, b, w, backend):
        def run(x, b):
            return quantized_matmul(
                x, w, bias=b if sizes["bias"] else None, activations=sizes["activations"], backend=backend
            )

        y, pullback = jax.vjp(run, x, b)
        return y, *pullback(dy)

    actual = jax.jit(partial(both, backend="pallas_gpu"))(x, dy, b, w)
    with jax.enable_x64(True):
        wide = (a.astype(np.float64) for a in (x, dy, b))
        wanted = jax.jit(partial(both, backend="reference"))(*wide, w)
    for a, e in zip(actual, wanted, strict=True):
        if np.any(np.asarray(e)):
            assert_close(a, e, dtype)
        else:
            assert not np.any(np.asarray(a, np.float32))  # no bias, no gradient


def memory(rows, tile_row):
    """Return bytes [rows, 128], and how the copy engine lays them out: swizzled by 128 bytes."""
    flat = np.zeros(rows // 8 * tile_row, np.uint8)
    matrix = generator(2).integers(0, 256, (rows, 128)).astype(np.uint8)
    for row, column in np.ndindex(matrix.shape):
        inside = (column // 16 ^ row % 8) * 16 + column % 16
        flat[row // 8 * tile_row + row % 8 * 128 + inside] = matrix[row, column]
    return matrix, flat


def loaded(flat, places, transposed):
    """Return what `ldmatrix` gives [lane, matrix, 2] for the places of 32 lanes' rows: PTX's definition."""
    matrices = np.stack([flat[p : p + 16].view(np.uint16) for p in places]).reshape(4, 8, 8)
    lane, two = np.arange(32)[:, None], np.arange(2)
    at = (lane % 4 * 2 + two, lane // 4) if transposed else (lane // 4, lane % 4 * 2 + two)
    return np.moveaxis(matrices[:, *at], 0, 1)


@pytest.mark.parametrize("tile_row", [1024, 2048])
def test_words_reach_the_registers_that_wgmma_wants(tile_row):
    """PTX: of A [64, 16], thread t of the four in a row has columns 2t and 2t + 1, and those 8 further."""
    matrix, flat = memory(16, tile_row)
    words = matrix.view(np.uint16)  # [row k, r]
    lanes = np.arange(32)
    for warp in range(4):
        r = 16 * warp + lanes // 4
        found = loaded(flat, registers.word_place(lanes, warp, tile_row, False), True)
        for later, beside, two in np.ndindex(2, 2, 2):
            wanted = words[lanes % 4 * 2 + two + 8 * later, r + 8 * beside]
            np.testing.assert_array_equal(found[:, 2 * later + beside, two], wanted)
        # Operands of one byte: thread t has columns 4t, ..., 4t + 3.
        found = loaded(flat, registers.word_place(lanes, warp, tile_row, True), True)
        for later, beside, two in np.ndindex(2, 2, 2):
            wanted = words[lanes % 4 * 4 + two + 2 * later, r + 8 * beside]
            np.testing.assert_array_equal(found[:, 2 * later + beside, two], wanted)


def test_rows_reach_the_registers_that_wgmma_wants():
    matrix, flat = memory(64, 1024)
    words, lanes = matrix.view(np.uint16), np.arange(32)
    for first in range(0, 64, 16):
        for k in range(4):
            found = loaded(flat, registers.row_place(lanes, first, k, 1024), False)
            for later, below, two in np.ndindex(2, 2, 2):
                wanted = words[first + lanes // 4 + 8 * below, 16 * k + lanes % 4 * 2 + two + 8 * later]
                np.testing.assert_array_equal(found[:, 2 * later + below, two], wanted)


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("int4", dict(N=200), "columns by 128, not 200"),
        ("int4", dict(K=250), "K by 128"),
        ("int4", dict(K=768, group=96), "groups that divide 256"),
        ("int4", dict(group=8), "groups of whole 16s"),
        ("int1", dict(), "2 to 8 bits, not 1"),
        ("dynamic8", dict(), "no decoder of dynamic8"),
        ("int4", dict(dtype="float32"), "not float32"),
        ("uint4", dict(activations="int8"), "without zeros"),
        ("nf4", dict(activations="int8"), "not int8 by nf4"),
        ("int3", dict(activations="int8"), "by 64 codes of a group at once"),
        ("int4", dict(activations=frugax.kernels.MixedActivations(1, block=256)), "one format"),
    ],
)
def test_what_it_leaves_to_xla(name, sizes, reason):
    sizes = dict(K=256, N=128, group=None, dtype="bfloat16", activations=None) | sizes
    K, N = sizes["K"], sizes["N"]
    quantize = partial(frugax.formats.quantize, format=name, group_size=sizes["group"])
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((K, N), jnp.float32))
    call, spec = check(jnp.zeros((2, K), sizes["dtype"]), w, None, sizes["activations"], None)
    assert reason in OPERATION.unsupported_reason("pallas_gpu", call, {"spec": spec})


@pytest.mark.parametrize(("M", "tokens", "splits"), [(1, 8, 8), (16, 16, 8), (64, 64, 8), (256, 128, 4)])
def test_products_of_few_tokens_share_the_sum_over_rows(M, tokens, splits):
    """128 programs for 132 processors, and shared memory for two steps at least."""
    quantize = partial(frugax.formats.quantize, format="int4", group_size=128)
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    sizes, _ = tiling(*check(jnp.zeros((M, 4096), jnp.bfloat16), w, None, None, None))
    assert (sizes.tokens, sizes.splits) == (tokens, splits)
    assert sizes.stages >= 2
