"""Tests of grouped_matmul alone: tiles, rows of no group, what stays with its own expert, memory, values."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import frugax
from frugax.kernels import grouped_matmul
from frugax.kernels.grouped_matmul.inputs import _within
from tests.errors import assert_close
from tests.kernels.harness import OPERATIONS
from tests.seeds import generator

from .calls import GOOD, VALUES
from .definition import grouped_matmul as in_float64

ROW = OPERATIONS["grouped_matmul"]
full = pytest.mark.full


@pytest.fixture(scope="module")
def products():
    """Return a compiled function of x [900, 3], W [5, 3, 4], sizes and dy: the result and both gradients."""

    @jax.jit
    def run(x, W, sizes, dy):
        y, pullback = jax.vjp(partial(grouped_matmul, group_sizes=sizes), x, W)
        return y, *pullback(dy)

    rng = generator(5)
    x, W, dy = (rng.standard_normal(s).astype(np.float32) for s in ((900, 3), (5, 3, 4), (900, 4)))
    return lambda sizes, x=x, dy=dy: run(x, W, jnp.asarray(sizes, jnp.int32), dy), x, W, dy


EDGES = [
    [0, 0, 0, 0, 0],
    [900, 0, 0, 0, 0],
    [0, 0, 0, 0, 900],
    [256, 512, 0, 32, 64],
    [1, 255, 257, 33, 65],
    [128, 129, 192, 193, 258],
    [31, 1, 800, 0, 7],
]


def defined(x, W, sizes, dy):
    """Return y, dx and dW in float64."""
    owner = np.repeat(np.arange(6), [*sizes, 900 - sum(sizes)])
    wide = np.concatenate([W, np.zeros((1, 3, 4))]).astype(float)
    dW = np.stack([x[owner == e].T.astype(float) @ dy[owner == e] for e in range(5)])
    own = wide[owner]
    return np.einsum("ik,ikn->in", x, own), np.einsum("in,ikn->ik", dy, own), dW


@pytest.mark.parametrize("sizes", EDGES, ids=str)
def test_groups_of_any_size_meet_every_tile(products, sizes):
    run, x, W, dy = products
    for got, want in zip(run(sizes), defined(x, W, sizes, dy), strict=True):
        assert not np.asarray(got)[want == 0].any()
        if want.any():
            assert_close(got, want, "float32", name=str(sizes))


@pytest.mark.nan
def test_what_is_not_finite_stays_with_its_expert(products):
    """An infinity of one expert's rows, NaN past all groups: other rows and experts have their numbers."""
    run, x, W, dy = products
    sizes, bad = [256, 300, 0, 40, 200], slice(256, 556)
    x, dy = x.copy(), dy.copy()
    want = defined(x, W, sizes, dy)
    for a in (x, dy):
        a[bad], a[796:] = np.inf, np.nan
    y, dx, dW = (np.array(a) for a in run(sizes, x, dy))
    for got, rows in zip((y, dx), want, strict=False):
        assert not np.isfinite(got[bad]).all()
        got[bad], rows[bad] = 0, 0
        assert_close(got, rows, "float32")
    assert_close(dW[[0, 2, 3, 4]], want[2][[0, 2, 3, 4]], "float32")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("change", "message"), VALUES)
def test_values_that_cannot_be_right_raise_outside_of_jit(change, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**GOOD | change)


def test_traced_values_out_of_range_have_no_rows():
    """Groups end at the last row, negative sizes are 0, other rows read zeros or are added to nothing."""
    arguments = ROW.arguments({"sizes": [4, 2, 5], "K": 3, "N": 2, "T": 6, "out_rows": 4, "weighted": True})
    gather, scatter = arguments["gather"], arguments["scatter"]
    zero = np.zeros((1, 3), np.float32)
    want = in_float64(
        np.concatenate([arguments["lhs"], zero]),
        arguments["rhs"],
        [4, 0, 7],
        np.where(np.arange(11) == 2, 6, gather),
        np.where(np.arange(11) == 5, 4, scatter),
        arguments["weights"],
        5,
    )[:4]
    wrong = {
        "group_sizes": np.array([4, -2, 50], np.int32),
        "gather": np.where(np.arange(11) == 2, -1, gather),
        "scatter": np.where(np.arange(11) == 5, 99, scatter),
    }
    out_rows = arguments.pop("out_rows")
    run = jax.jit(partial(grouped_matmul, out_rows=out_rows))
    assert_close(run(**arguments | wrong), want, "float32")


def test_traced_sizes_whose_sum_wraps_are_seen():
    """Groups of sizes in 32 bits end at the last row too, and a check of `checkify` fails."""
    checked = checkify.checkify(jax.jit(lambda sizes: _within(sizes, 5)), errors=checkify.user_checks)
    cases = {
        (2, 0, 3, 0): [2, 0, 3, 0],
        (1, 1, 0, 0): [1, 1, 0, 0],
        (1, 2**30, 2**30, 2**31 - 1): [1, 4, 0, 0],
        (2**30, 2**30, 2**30, 2**30): [5, 0, 0, 0],
        (-1, 3, 3, 3): [0, 3, 2, 0],
    }
    for sizes, want in cases.items():
        failed, found = checked(jnp.array(sizes, jnp.int32))
        assert found.tolist() == want
        assert (failed.get() is None) == (list(sizes) == want)


def test_sizes_of_64_bits_do_not_wrap():
    with jax.enable_x64(True):
        sizes = jnp.array([2**32 + 3, 1, 0])
        assert sizes.dtype == jnp.int64
        with pytest.raises(
            ValueError, match=r"group_sizes: got \[4294967299, 1, 0\]; expected sizes >= 0, 7"
        ):
            _within(sizes, 7)
        assert jax.jit(lambda sizes: _within(sizes, 7))(sizes).tolist() == [7, 0, 0]
        assert _within(jnp.array([3, 1, 0]), 7).dtype == jnp.int32


def test_a_mixture_by_gather_and_scatter_is_dispatch_and_combine():
    rng = generator(6)
    x, W = (rng.standard_normal(s).astype(np.float32) for s in ((9, 4), (3, 4, 5)))

    @jax.jit
    def both(x, W):
        routing = frugax.moe.softmax_top_k(x[:, :3], 2)
        rows, plan = frugax.moe.dispatch(x, routing)
        tokens, experts, weights = routing.assignments()
        order = jnp.argsort(experts, stable=True)
        routed = {"gather": tokens[order], "scatter": tokens[order], "weights": weights[order]}
        want = frugax.moe.combine(grouped_matmul(rows, W, plan.group_sizes), plan)
        return grouped_matmul(x, W, plan.group_sizes, **routed, out_rows=9), want

    assert_close(*both(x, W), "float32")


@full
@pytest.mark.parametrize("format", [None, "int4"])
def test_memory_is_that_of_rows_and_one_expert(format):
    """Neither a copy of rows for each expert, nor of packed experts as floats; 32 experts of 64 KB."""
    E, M, K, N = 32, 1024, 128, 128
    rhs = jnp.ones((E, K, N))
    rhs = rhs if format is None else frugax.formats.quantize(rhs, format, axis=1)
    x, sizes = jnp.ones((M, K)), jnp.full(E, M // E, jnp.int32)

    def loss(x, rhs):
        return jnp.sum(jnp.sin(grouped_matmul(x, rhs, sizes)))

    argnums = (0, 1) if format is None else 0
    compiled = jax.jit(jax.grad(loss, argnums)).lower(x, rhs).compile()
    # Rows in and out and their cotangents; a few experts at a time.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (6 * M * (K + N) // 2 + 8 * K * N)
