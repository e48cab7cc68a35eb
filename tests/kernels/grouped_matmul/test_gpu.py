"""The GPU kernels, interpreted, and the tiles that they go through."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.kernels.grouped_matmul import OPERATION, grouped_matmul
from frugax.kernels.grouped_matmul.inputs import check
from frugax.kernels.grouped_matmul.pallas_gpu.experts import edges
from frugax.kernels.grouped_matmul.pallas_gpu.persistent import banded
from frugax.kernels.grouped_matmul.pallas_gpu.product import visits
from frugax.kernels.grouped_matmul.pallas_gpu.tiling import DEPTH, of_experts, of_rows
from tests.errors import assert_close
from tests.seeds import generator

full = pytest.mark.full
CASES = [
    ([70, 0, 5], dict(M=80)),  # a group longer than a tile, one of no rows, a tile of a few, rows of no group
    *(
        pytest.param(group_sizes, sizes, marks=full)
        for group_sizes, sizes in (
            ([137, 163], dict(M=300, K=128, N=320)),  # tiles of two warpgroups
            ([0, 200, 0], dict(M=200, dtype="float16")),  # all rows of one group
            ([0, 0], dict(M=3)),
            ([3, 2, 1, 1], dict(M=9, N=192)),  # fewer rows than a chunk has
        )
    ),
]


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


@pytest.mark.parametrize("rows", [64, 128])
def test_tiles_of_rows_have_each_row_of_a_group_and_no_other(rows):
    rng = generator(2)
    for E, M in ((3, 300), (40, 700)):
        sizes = rng.multinomial(rng.integers(M + 1), rng.dirichlet(np.full(E, 0.3)))
        found, (count,) = map(np.asarray, visits(jnp.asarray(sizes, jnp.int32), M, rows))
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
        (dict(format="int4"), "no decoder of packed experts"),
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
