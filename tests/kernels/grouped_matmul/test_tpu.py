"""The TPU kernels of grouped_matmul alone: visits, borders of groups, several blocks, compilers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import frugax
from experiments.benchmarks.deviceless_tpu import CHIPS, compile_for, has_libtpu
from frugax.kernels import grouped_matmul
from frugax.kernels.grouped_matmul import pallas_tpu
from frugax.kernels.grouped_matmul.inputs import check
from frugax.kernels.grouped_matmul.pallas_tpu.outer import outer_sums
from frugax.kernels.grouped_matmul.pallas_tpu.packed import Packed
from frugax.kernels.grouped_matmul.pallas_tpu.product import multiply
from frugax.kernels.grouped_matmul.pallas_tpu.tiling import (
    OuterTiling,
    Tiling,
    for_outer,
    for_product,
    heights_for,
)
from frugax.kernels.grouped_matmul.pallas_tpu.visits import STRIPE, visits
from tests.errors import assert_close
from tests.seeds import generator

full = pytest.mark.full


def test_visits_have_each_row_of_a_group_once():
    """Every row is its own group's, a stripe is written when all of its rows are there, and none is left."""
    rng, heights = generator(3), (16, 32, 64)
    run = jax.jit(visits, static_argnums=(1, 2), static_argnames="every_group")
    for E, rows in ((3, 304), (40, 704), (5, 64)):
        sizes = rng.multinomial(rng.integers(rows + 1), rng.dirichlet(np.full(E, 0.3)))
        owner = np.repeat(np.arange(E + 1), [*sizes, rows - sum(sizes)])
        for every_group in (False, True):
            found = run(sizes.astype(np.int32), rows, heights, every_group=every_group)
            found = jax.tree.map(np.asarray, found)
            (total,) = found.total
            assert total <= len(found.group)
            seen, written = np.zeros(rows, int), np.zeros(rows, int)
            for group, block, base, start, low, high, kind in zip(*found[:-1], strict=True):
                if total == 0:
                    break
                total -= 1
                seen[low:high] += 1
                written[start : high & -STRIPE] += 1
                assert block % STRIPE == base % STRIPE == start % STRIPE == 0
                assert 0 <= block <= rows - heights[-1]
                if kind < len(heights):
                    assert (owner[low:high] == group).all()
                    assert block <= base <= start <= low < high <= base + heights[kind]
                    assert base + heights[kind] <= block + heights[-1]
                else:
                    assert low >= high or (owner[low:high] == E).all()
            assert (seen == (owner < E if every_group else 1)).all()
            assert every_group or (written == 1).all()
            for wrong in (sizes + rows, sizes - rows):  # copies test no addresses
                found = run(wrong.astype(np.int32), rows, heights, every_group=every_group)
                assert 0 <= np.min(found.block) <= np.max(found.block) <= rows - heights[-1]
                assert 0 <= np.min(found.start) <= np.max(found.start) < rows
                assert np.max(found.high) <= rows


SIZES = [5, 0, 40, 3, 2, 100, 0, 17]  # several groups in a stripe, one longer than a tile; 33 rows of none


def drawn(dtype, M=200, K=96, N=300, sizes=SIZES):
    """Return x, w, dy, sizes and the group of each row; not-a-number in group 3 and past the groups."""
    rng = generator(4)
    x, w, dy = (rng.standard_normal(s).astype(jnp.dtype(dtype)) for s in ((M, K), (len(sizes), K, N), (M, N)))
    group = np.repeat(np.arange(len(sizes) + 1), [*sizes, M - sum(sizes)])
    x[(group == 3) | (group == len(sizes))] = np.nan
    return x, w, dy, jnp.asarray(sizes, jnp.int32), group


@pytest.mark.nan
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=full)])
def test_borders_and_blocks(dtype):
    """Groups that share a tile, several blocks of columns, rows that are not finite stay their own."""
    x, w, dy, sizes, group = drawn(dtype)
    heights, E = (16, 48, 64), len(SIZES)
    wide = np.asarray(w, float)[np.minimum(group, E - 1)]
    for transposed in (False, True):
        t = Tiling(heights, 128)
        stored = np.swapaxes(w, 1, 2) if transposed else w
        y = jax.jit(partial(multiply, t=t, transposed=transposed, interpret=True))(x, stored, sizes)
        right = np.isfinite(np.asarray(x[:, 0], float))
        assert_close(
            y[right], np.einsum("mk,mkn->mn", np.asarray(x, float)[right], wide[right]), str(x.dtype)
        )
        assert np.isnan(np.asarray(y, float)[group == 3]).all()
        assert not np.asarray(y, float)[group == E].any()
    t = OuterTiling(heights, 128, 256)
    dw = np.asarray(jax.jit(partial(outer_sums, t=t, interpret=True))(x, dy, sizes), float)
    assert dw.shape == w.shape
    assert np.isnan(dw[3]).all()
    for e, size in enumerate(SIZES):
        mine = group == e
        if size == 0:
            assert not dw[e].any()
        elif e != 3:
            assert_close(dw[e], np.asarray(x, float)[mine].T @ np.asarray(dy, float)[mine], str(x.dtype))


def test_groups_that_share_no_stripe():
    """Two of the three visits copy their rows as they are multiplied, and one after."""
    M, K, N, E = 96, 64, 128, 3
    x, w, *_ = drawn("bfloat16", M, K, N, [M // E] * E)
    x = np.nan_to_num(x)
    t = Tiling((16, 32, 48), 128)
    y = jax.jit(partial(multiply, t=t, interpret=True))(x, w, jnp.full(E, M // E, jnp.int32))
    want = np.einsum("emk,ekn->emn", np.asarray(x, float).reshape(E, -1, K), np.asarray(w, float))
    assert_close(y, want.reshape(M, N), "bfloat16")


@full
def test_the_program_that_a_chip_gets(monkeypatch):
    """Copies of run-time size, in an interpreter of TPU memory: they happen when waited for, into NaN."""
    call, memory = pl.pallas_call, pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    monkeypatch.setattr(
        pl, "pallas_call", lambda *given, interpret, **named: call(*given, interpret=memory, **named)
    )
    M, K, N, E, heights = 104, 96, 200, 5, (16, 32)
    x, w, dy, *_ = drawn("float32", M, K, N, [0] * E)
    x = np.nan_to_num(x) + 1
    t, wide = Tiling(heights, 128), OuterTiling(heights, 128, 128)

    @jax.jit
    def run(x, w, dy, sizes):
        forward, backward = (
            partial(multiply, t=t, transposed=back, interpret=False) for back in (False, True)
        )
        return forward(x, w, sizes), backward(dy, w, sizes), outer_sums(x, dy, sizes, wide, interpret=False)

    for sizes in ([5, 0, 43, 2, 37], [0, 0, M, 0, 0], [0] * E):
        y, dx, dw = map(np.asarray, run(x, w, dy, jnp.asarray(sizes, jnp.int32)))
        group, real = np.repeat(np.arange(E), sizes), sum(sizes)
        for found, rows, matrix in ((y, x, w), (dx, dy, np.swapaxes(w, 1, 2))):
            assert not found[real:].any()  # NaN would be rows that no copy has reached
            if real:
                expected = np.einsum("mk,mkn->mn", rows[:real].astype(float), matrix[group].astype(float))
                assert_close(found[:real], expected, "float32")
        for e in range(E):
            mine = group == e
            expected = x[:real][mine].astype(float).T @ dy[:real][mine].astype(float)
            if mine.any():
                assert_close(dw[e], expected, "float32")
            else:
                assert not dw[e].any()


@pytest.mark.parametrize(
    ("format", "group_size", "dtype"),
    [
        ("int4", 128, "bfloat16"),
        *(
            pytest.param(*given, marks=full)
            for given in (("uint3", 100, "float32"), ("nvfp4", None, "bfloat16"), ("nf4_dq", None, "float32"))
        ),
    ],
)
def test_packed_experts_in_several_blocks(format, group_size, dtype):
    K, N, sizes = 512, 300, [20, 0, 3, 50]
    x, w, dy, group_sizes, group = drawn(dtype, 80, K, N, sizes)
    x = np.nan_to_num(np.asarray(x, np.float32)).astype(x.dtype)
    w = frugax.formats.quantize(jnp.asarray(w, jnp.float32), format, axis=1, group_size=group_size)
    call, spec = check(jnp.asarray(x), w, group_sizes, None, None, None, None)
    assert pallas_tpu.unsupported_reason(call, spec) is None
    wide = np.asarray(w.dequantize(jnp.float32), float)[np.minimum(group, len(sizes) - 1)]
    wide[group == len(sizes)] = 0
    packed = Packed.of(call, spec)
    heights = (16, 32)
    forward = partial(multiply, w=packed, t=Tiling(heights, 128), interpret=True)
    y = jax.jit(lambda x: forward(x, group_sizes=group_sizes))(x)
    assert_close(
        y, np.einsum("mk,mkn->mn", np.asarray(x, float), wide), dtype, times=2
    )  # experts are rounded too
    backward = partial(multiply, w=packed, t=Tiling(heights, 256), transposed=True, interpret=True)
    dx = jax.jit(lambda dy: backward(dy, group_sizes=group_sizes))(dy)
    assert_close(
        dx[:, :K], np.einsum("mn,mkn->mk", np.asarray(dy, float), wide), dtype, times=2
    )  # experts are rounded too


def test_sizes_follow_from_groups_and_memory():
    """A visit sees a whole group if it is small; wide matrices go in parts; what never fits is refused."""
    assert heights_for(8192, 8) == (128, 256, 384, 512)
    assert heights_for(8192, 64) == (64, 128, 160, 192)
    assert heights_for(5, 3) == (16,)
    assert for_product(8192, 2048, 4096, 8, itemsize=2) == Tiling((128, 256, 384, 512), 1024)
    assert for_product(8192, 2048, 1024, 64, itemsize=2) == Tiling((64, 128, 160, 192), 1024)
    assert for_product(8192, 14336, 4096, 8, itemsize=2) == Tiling((32, 64, 96, 128), 512)
    assert for_product(8192, 2**20, 128, 8, itemsize=2) is None
    assert for_outer(8192, 2048, 4096, 8, itemsize=2).columns >= 512


COMPILED = [
    (dict(E=3, M=60, K=512, N=200, dtype="bfloat16"), "int4", 128),
    (dict(E=3, M=100, K=40, N=20, dtype="float32"), None, None),
    (dict(E=3, M=5, K=5, N=3, dtype="bfloat16"), None, None),
    (dict(E=64, M=8192, K=2048, N=1408, dtype="bfloat16"), None, None),
    (dict(E=3, M=60, K=300, N=130, dtype="float32"), "uint3", 100),
    (dict(E=3, M=60, K=256, N=130, dtype="bfloat16"), "nvfp4", None),
]


@pytest.mark.deviceless
@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (the `deviceless` extra)")
@pytest.mark.parametrize(
    ("chip", "sizes", "format", "group_size"),
    [
        pytest.param(chip, *given, marks=[] if (chip, i) in (("v5e", 0), ("tpu7x", 1)) else full)
        for chip in CHIPS
        for i, given in enumerate(COMPILED)
    ],
)
def test_kernels_compile(chip, sizes, format, group_size):
    """Both passes, for sizes and experts that the table's call leaves out."""
    E, M, K, N, dtype = sizes.values()
    struct = jax.ShapeDtypeStruct
    w = struct((E, K, N), jnp.float32 if format else dtype)
    if format:
        quantize = partial(frugax.formats.quantize, format=format, axis=1, group_size=group_size)
        w = jax.eval_shape(quantize, w)

    def both(x, w, group_sizes, dy):
        floats = () if format else (w,)
        run = partial(grouped_matmul, group_sizes=group_sizes, backend="pallas_tpu")
        y, pullback = jax.vjp(lambda x, *w_: run(x, *(w_ or (w,))), x, *floats)
        return y, pullback(dy)

    shapes = struct((M, K), dtype), w, struct((E,), jnp.int32), struct((M, N), dtype)
    program = compile_for(chip, both, *shapes).as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == (2 if format else 3)
