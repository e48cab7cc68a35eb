"""The GPU kernels, interpreted, and the tiles that they go through."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from experiments.benchmarks import deviceless_gpu
from frugax.kernels.grouped_matmul import OPERATION, grouped_matmul, pallas_gpu, xla
from frugax.kernels.grouped_matmul.inputs import check
from frugax.kernels.grouped_matmul.pallas_gpu.experts import edges
from frugax.kernels.grouped_matmul.pallas_gpu.packed import places
from frugax.kernels.grouped_matmul.pallas_gpu.persistent import banded
from frugax.kernels.grouped_matmul.pallas_gpu.product import visits
from frugax.kernels.grouped_matmul.pallas_gpu.tiling import DEPTH, of_experts, of_rows
from tests.errors import assert_close
from tests.seeds import generator

full = pytest.mark.full
CASES = [
    ([70, 0, 5], dict(M=80)),  # a group longer than a tile, one of no rows, a tile of a few, rows of no group
    ([137, 163], dict(M=300, K=128, N=320)),  # tiles of two warpgroups
    ([0, 200, 0], dict(M=200, dtype="float16")),  # all rows of one group
    ([0, 0], dict(M=3)),
    ([3, 2, 1, 1], dict(M=9, N=192)),  # fewer rows than a chunk has
]


@full
@pytest.mark.parametrize(("group_sizes", "sizes"), CASES)
def test_the_products_are_the_definitions(group_sizes, sizes):
    """What lies past the groups may be anything, also not finite."""
    M, K, N, dtype = (
        ({"K": 64, "N": 64, "dtype": "bfloat16"} | sizes)[key] for key in ("M", "K", "N", "dtype")
    )
    rng, total = generator(1), sum(group_sizes)
    x, w, dy = (
        rng.standard_normal(s).astype(jnp.dtype(dtype)) for s in ((M, K), (len(group_sizes), K, N), (M, N))
    )
    x[total:], dy[total:] = np.nan, np.nan
    group_sizes = jnp.asarray(group_sizes, jnp.int32)

    def both(x, w, dy, backend):
        y, pullback = jax.vjp(partial(grouped_matmul, group_sizes=group_sizes, backend=backend), x, w)
        return y, *pullback(dy)

    actual = jax.jit(partial(both, backend="pallas_gpu"))(x, w, dy)
    with jax.enable_x64(True):
        wanted = jax.jit(partial(both, backend="reference"))(*(np.asarray(a, np.float64) for a in (x, w, dy)))
    for a, e in zip(actual, wanted, strict=True):
        if np.any(np.asarray(e)):
            assert_close(a, e, dtype)
        else:
            assert not np.any(np.asarray(a, np.float32))  # no rows, no gradient
    assert not np.any(np.asarray(actual[0][total:], np.float32))


@full
@pytest.mark.parametrize(
    ("format", "group", "group_sizes", "M"),
    [
        ("uint4", 64, [11, 0, 3], 16),  # zeros; an expert's rows in two tiles
        ("nvfp4", None, [0, 2], 4),  # scales in two levels
        ("int3", 128, [1] * 6, 6),  # two planes of bits
    ],
)
def test_packed_experts_are_decoded_where_they_are_multiplied(format, group, group_sizes, M):
    rng, E = generator(4), len(group_sizes)
    w = frugax.formats.quantize(
        jnp.asarray(rng.standard_normal((E, 256, 128)), jnp.float32), format, axis=1, group_size=group
    )
    x, dy = (jnp.asarray(rng.standard_normal((M, n)), jnp.bfloat16) for n in (256, 128))
    group_sizes = jnp.asarray(group_sizes, jnp.int32)

    def both(x, dy, backend):
        y, pullback = jax.vjp(lambda x: grouped_matmul(x, w, group_sizes=group_sizes, backend=backend), x)
        return y, *pullback(dy)

    actual = jax.jit(partial(both, backend="pallas_gpu"))(x, dy)
    with jax.enable_x64(True):
        wanted = jax.jit(partial(both, backend="reference"))(*(np.asarray(a, np.float64) for a in (x, dy)))
    for a, e in zip(actual, wanted, strict=True):
        assert_close(a, e, "bfloat16")


def test_places_of_packed_experts_rows_are_in_tiles_of_their_expert():
    rng, tokens = generator(5), 8
    run = jax.jit(places, static_argnums=(1, 2))
    for E, M in ((3, 100), (40, 33)):
        sizes = rng.multinomial(rng.integers(M + 1), rng.dirichlet(np.full(E, 0.3)))
        expert, row = map(np.asarray, run(sizes.astype(np.int32), M, tokens))
        owner, total = np.repeat(np.arange(E), sizes), sum(sizes)
        assert len(set(row[:total])) == total
        np.testing.assert_array_equal(expert[row[:total] // tokens], owner)
        assert (row[total:] == len(expert) * tokens).all()
        assert (expert >= 0).sum() == sum(-(-size // tokens) for size in sizes)


@pytest.mark.parametrize("rows", [64, 128])
def test_tiles_of_rows_have_each_row_of_a_group_and_no_other(rows):
    rng, run = generator(2), jax.jit(visits, static_argnums=(1, 2))
    for E, M in ((3, 300), (40, 700)):
        sizes = rng.multinomial(rng.integers(M + 1), rng.dirichlet(np.full(E, 0.3)))
        found, (count,) = map(np.asarray, run(sizes.astype(np.int32), M, rows))
        owner = np.repeat(np.arange(E + 1), [*sizes, M - sum(sizes)])
        stored = np.zeros(M, int)
        for group, first, height in found[:, :count].T:
            assert 0 < height <= rows
            assert (owner[first : first + height] == group).all()
            stored[first : first + height] += 1
        assert stored.min() >= 1  # of the rows of two tiles, both store the same
        assert count <= found.shape[1]
        assert count == sum(-(-size // rows) for size in (*sizes, M - sum(sizes)))


def test_chunks_at_the_edges_have_their_groups_rows_alone():
    sizes = np.array([0, 30, 0, 1, 130, 64])
    end = np.cumsum(sizes)
    start = end - sizes
    x = generator(3).standard_normal((230, 2)).astype(np.float32)
    x[end[-1] :] = np.nan
    found = np.asarray(edges(*map(jnp.asarray, (x, start, end)))).reshape(len(sizes), 2, DEPTH, 2)
    for e, (s, t) in enumerate(zip(start, end, strict=True)):
        for which, chunk in enumerate((s // DEPTH, max(t - 1, 0) // DEPTH)):
            row = chunk * DEPTH + np.arange(DEPTH)
            mine = ((row >= s) & (row < t))[:, None]
            np.testing.assert_array_equal(found[e, which], np.where(mine, x[np.minimum(row, 229)], 0))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (4, 19), (3, 16)])
def test_every_tile_is_visited_once(rows, columns):
    i, j = banded(jnp.arange(rows * columns), rows, columns)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == set(np.ndindex(rows, columns))
    assert len(i) == rows * columns


def test_tiles_are_as_wide_as_leave_work_for_each_processor():
    assert of_rows(16384, 8, 14336) == (2, 256, 4)  # warpgroups, columns, steps in shared memory
    assert of_rows(16384, 8, 1408)[:2] == (2, 128)
    assert of_rows(64, 128, 2048)[:2] == (1, 256)  # few rows a group
    assert of_rows(8, 4, 2048)[:2] == (1, 64)
    assert of_experts(8, 4096, 14336) == (2, 256, 4)
    assert of_experts(2, 64, 192)[:2] == (1, 64)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (dict(dtype="float32"), "not float32"),
        (dict(K=96), "K and N by 64, not K=96 and N=64"),
        (dict(N=100), "N=100"),
        (dict(format="int4"), "columns by 128, not 64"),
        (dict(format="int1", K=256, N=128), "2 to 8 bits, not 1"),
        (dict(format="int4", K=256, N=128, dtype="float32"), "not float32"),
    ],
)
def test_what_it_leaves_to_xla(sizes, reason):
    sizes = {"K": 64, "N": 64, "dtype": "bfloat16", "format": None} | sizes
    K, N, dtype = sizes["K"], sizes["N"], sizes["dtype"]
    w = jnp.zeros((2, K, N), dtype)
    if sizes["format"] is not None:
        w = frugax.formats.quantize(w.astype(jnp.float32), sizes["format"], axis=1)
    call, spec = check(jnp.zeros((3, K), dtype), w, jnp.array([1, 2]), None, None, None, None)
    assert reason in OPERATION.unsupported_reason("pallas_gpu", call, {"spec": spec})


def test_a_shard_of_columns_that_64_does_not_divide_is_xlas():
    rng = generator(6)
    x, w, dy = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((3, 64), (2, 64, 32), (3, 32)))
    call, spec = check(x, w, jnp.array([1, 2]), None, None, None, None)
    assert_close(pallas_gpu.forward(call, spec, interpret=True), xla.forward(call, spec), "bfloat16")
    gradients = pallas_gpu.backward(call, dy, spec, interpret=True), xla.backward(call, dy, spec)
    assert_close(*((g.lhs, g.rhs) for g in gradients), "bfloat16")


@full
@pytest.mark.deviceless
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax-cuda13-plugin")
@pytest.mark.parametrize(("format", "kernels"), [(None, 3), ("uint4", 2), ("nvfp4", 2)])
def test_few_rows_of_many_experts_compile_for_h200(format, kernels):
    """One warpgroup multiplies; and packed experts, which have no gradient."""
    x, w, dy = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 256), (32, 256, 384), (64, 384)))
    if format is not None:
        w = jax.eval_shape(partial(frugax.formats.quantize, format=format, axis=1), w)

    def both(x, w, sizes, dy):
        if format is None:
            y, pullback = jax.vjp(partial(grouped_matmul, group_sizes=sizes), x, w)
        else:
            y, pullback = jax.vjp(lambda x: grouped_matmul(x, w, sizes), x)
        return y, pullback(dy)

    found = deviceless_gpu.kernels_for_h200(both, x, w, jax.ShapeDtypeStruct((32,), jnp.int32), dy)
    assert len(found) == kernels
    for kernel in found:
        assert kernel.spill_stores == kernel.spill_loads == 0
        assert kernel.wgmma > 0
