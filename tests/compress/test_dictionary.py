"""QMoE's dictionary code against a decoder in plain Python, its size against the entropy, its product."""

import dataclasses
import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frugax.compress import CompressedTernary, compress_ternary, dictionary_matmul
from frugax.compress.words import COUNT, ZEROS, dictionary, encode
from frugax.formats import format_named, quantize
from tests.errors import assert_close


def run_of(word) -> list[int]:
    """The trits of a codeword."""
    low, high = (int(x) for x in word)
    pairs = [(low >> 4 * i) & 15 for i in range(7)] + [(high >> 4 * i) & 15 for i in range(7)]
    return [trit for pair in pairs[: low >> 28] for trit in (pair & 3, pair >> 2)]


def decoded(codes, offsets, K):
    """Rows of trits, run after run."""
    words = dictionary().words
    rows = [
        [trit for code in codes[a:b] for trit in run_of(words[code])] for a, b in itertools.pairwise(offsets)
    ]
    assert {len(row) for row in rows} == {K + K % 2}
    return np.array(rows)[:, :K]


def draw(p, shape, seed=0):
    """Trits of which a share of p is zero."""
    return np.random.default_rng(seed).choice(3, p=[p, (1 - p) / 2, (1 - p) / 2], size=shape)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
def test_rows_come_back(p):
    trits = draw(p, (5, 61))
    codes, offsets = encode(trits)
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(decoded(codes, offsets, 61), trits)


def test_bits_are_near_the_entropy():
    """Within a fifth of it where the dictionary was made for, and a third at the ends; offsets in 32 bits."""
    above = {}
    for p in (0.86, 0.88, 0.885, 0.9, 0.92):
        codes, offsets = encode(draw(p, (256, 2048)))
        entropy = -p * np.log2(p) - (1 - p) * np.log2((1 - p) / 2)
        bits = (16 * len(codes) + 32 * len(offsets)) / (256 * 2048)
        assert bits < 0.9 + (p < 0.87) * 0.05
        above[p] = 16 * len(codes) / (256 * 2048) / entropy
    assert 1 < above[0.885] < 1.2
    assert 1 < min(above.values()) < max(above.values()) < 1.35


@pytest.mark.full
def test_the_dictionary_is_that_of_a_priority_queue():
    """The authors' procedure: the likeliest sequence is taken, and its nine longer ones are queued."""
    pair = np.outer(*[[ZEROS, (1 - ZEROS) / 2, (1 - ZEROS) / 2]] * 2).reshape(-1)
    logs, queue, wanted = np.log(pair).tolist(), [(0.0, ())], []
    while len(wanted) < COUNT:
        cost, run = heapq.heappop(queue)
        if run:
            wanted.append((cost, run))
        if len(run) < 14:
            for p in range(9):
                heapq.heappush(queue, (cost - logs[p], (*run, p)))
    runs = [run_of(word) for word in dictionary().words]
    mine = [tuple(3 * a + b for a, b in zip(run[::2], run[1::2], strict=True)) for run in runs]
    assert len(set(mine)) == COUNT
    cost = [sum(-logs[p] for p in run) for run in mine]
    np.testing.assert_allclose(cost, [cost for cost, _ in wanted], rtol=1e-9)
    sure = max(cost) - 1e-6  # of equal costs which are taken is anyone's choice
    taken = {run for c, run in zip(cost, mine, strict=True) if c < sure}
    assert taken == {run for c, run in wanted if c < sure}
    assert len(taken) > COUNT / 2
    # the tree of runs leads to each of them
    for code in range(0, COUNT, 97):
        node = COUNT
        for p in mine[code]:
            node = dictionary().longer[node, p]
        assert node == code


def matrices(E, K, N):
    """Weights with about nine zeros in ten, and one column without a value below zero."""
    w = np.random.default_rng(1).standard_normal((E, K, N)).astype(np.float32) ** 3
    w[:, :, 2] = np.abs(w[:, :, 2])
    return jnp.asarray(w)


@pytest.mark.parametrize("format", ["ternary_minmax", pytest.param("ternary", marks=pytest.mark.full)])
def test_matrices_come_back_and_are_multiplied_block_by_block(format):
    """A stack of experts with odd sizes, in blocks that do not divide; values and gradients of x."""
    E, K, N, T = 3, 133, 21, 5
    q = quantize(matrices(E, K, N), format, axis=-2)
    packed = compress_ternary(q)
    assert packed.shape == (E, K, N)
    assert packed.nbytes == 2 * packed.codes.size + 4 * E * (N + 1) + 2 * E * N * packed.low.dtype.itemsize
    for e, (a, b) in enumerate(zip(packed.codes, packed.offsets, strict=True)):
        trits = np.asarray(q.unpacked()[e])
        np.testing.assert_array_equal(decoded(np.asarray(a), np.asarray(b), K), np.where(trits < 0, 2, trits))

    x = jnp.asarray(np.random.default_rng(2).standard_normal((E, T, K)), jnp.float32)
    one = lambda w, e: jax.tree.map(lambda leaf: leaf[e], w)  # noqa: E731

    @jax.jit
    def run(w: CompressedTernary, x):
        multiply = lambda x: dictionary_matmul(x, w, block=8)  # noqa: E731
        y, back = jax.vjp(multiply, x)
        (dx,) = back(jnp.cos(y))
        alone = dictionary_matmul(x[1, 0], one(w, 1))
        by_sizes, back = jax.vjp(lambda rows: dictionary_matmul(rows, w, jnp.asarray(sizes)), rows)
        return w.decode(), one(w, 1).decode(), y, dx, alone, by_sizes, back(jnp.ones_like(by_sizes))[0]

    sizes = [6, 0, 3]
    rows = jnp.concatenate([x[0], x[2]])  # nine rows of two experts, and one that is nobody's
    whole, second, y, dx, alone, by_sizes, drows = run(packed, x)
    np.testing.assert_array_equal(whole, q.dequantize())
    np.testing.assert_array_equal(second, whole[1])
    w = np.asarray(q.dequantize(), np.float64)
    want = np.asarray(x, np.float64) @ w
    assert_close(y, want, "float32")
    assert_close(alone, want[1, 0], "float32")
    assert_close(dx, np.cos(np.asarray(y, np.float64)) @ w.swapaxes(1, 2), "float32")
    of_rows = np.concatenate([np.repeat(w[e][None], size, 0) for e, size in enumerate([*sizes[:2], 3])])
    want = np.einsum("mk,mkn->mn", np.asarray(rows[:9], np.float64), of_rows)
    assert_close(by_sizes[:9], want, "float32")
    assert_close(drows[:9], of_rows.sum(-1), "float32")
    assert not by_sizes[9].any()
    assert not drows[9].any()


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_and_one_block(dtype):
    q = quantize(matrices(1, 200, 30)[0], "ternary_minmax")
    x = jax.random.normal(jax.random.key(0), (4, 200), dtype)
    y, back = jax.vjp(lambda x: dictionary_matmul(x, compress_ternary(q)), x)
    dx = back(y)[0]
    assert y.dtype == dx.dtype == dtype
    w = np.asarray(q.dequantize(), np.float64)
    assert_close(y, np.asarray(x, np.float64) @ w, dtype)
    assert_close(dx, np.asarray(y, np.float64) @ w.T, dtype)


def test_no_decoded_matrix_is_kept():
    """The product and its gradient hold less than the float32 matrix, forward and backward."""
    K, N = 512, 1024
    codes, offsets = encode(draw(0.9, (N, K)))
    ends = jnp.ones(N, jnp.bfloat16)
    w = CompressedTernary(jnp.asarray(codes), jnp.asarray(offsets), -ends, ends, K, 48)
    loss = lambda x, w: jnp.sum(dictionary_matmul(x, w, block=32) ** 2)  # noqa: E731
    x = jax.ShapeDtypeStruct((1, K), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(x, w).compile().memory_analysis()
    assert memory.temp_size_in_bytes < K * N * 4 / 2


def test_strict_settings():
    """No promotion of ranks or dtypes, which users may forbid."""
    offsets = jnp.arange(4, dtype=jnp.int32)
    w = CompressedTernary(jnp.zeros(3, jnp.uint16), offsets, *[jnp.ones(3, jnp.bfloat16)] * 2, 10, 8)
    w = jax.tree.map(lambda x: jnp.stack([x, x]), w)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        loss = lambda x: dictionary_matmul(x, w).sum()  # noqa: E731
        assert jax.eval_shape(jax.grad(loss), jnp.ones((2, 4, 10))).shape == (2, 4, 10)
        assert jax.eval_shape(lambda w: w.decode(jnp.bfloat16), w).dtype == jnp.bfloat16


def test_bad_input(unchecked_types):
    w = jnp.ones((2, 8, 4))
    good = jax.jit(lambda w: quantize(w, "ternary_minmax", axis=-2))(w)
    for q, message in (
        (w, "q: got .*; expected a QuantizedTensor"),
        (dataclasses.replace(good, format=format_named("int2")), "q: got int2; expected"),
        (dataclasses.replace(good, axis=-1), "q: got .* along axis -1"),
        (dataclasses.replace(good, group_size=4), "q: got .* groups of 4"),
        (dataclasses.replace(good, scales=good.scales | 0x7F80), "q: got values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_ternary(q)
    packed = compress_ternary(good)
    for x, message in (
        (jnp.ones((2, 3, 7)), r"x: got .*; expected \[2, ..., 8\]"),
        (jnp.ones((3, 8)), "x: got"),
        (jnp.ones((2, 8), jnp.int32), "x: got .* floating"),
    ):
        with pytest.raises(ValueError, match=message):
            dictionary_matmul(x, packed)
    for x, sizes, message in (
        (jnp.ones((3, 7)), jnp.ones(2, jnp.int32), r"x: got .* expected floats \[M, K\]"),
        (jnp.ones((3, 8)), jnp.ones(3, jnp.int32), r"group_sizes: got int32\[3\]; expected integers \[2\]"),
        (jnp.ones((3, 8)), jnp.ones(2), "group_sizes: got float"),
    ):
        with pytest.raises(ValueError, match=message):
            dictionary_matmul(x, packed, sizes)
    with pytest.raises(ValueError, match="block: got 0"):
        dictionary_matmul(jnp.ones((2, 8)), packed, block=0)
    with pytest.raises(ValueError, match="w: got ArrayImpl"):
        dictionary_matmul(jnp.ones((2, 8)), w)
