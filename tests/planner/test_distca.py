"""Core attention in tasks: exact for any cut, balanced for few bytes, and documents placed for equal work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.planner import (
    CoreTask,
    balance_core_attention,
    balanced_order,
    core_attention,
    core_balance,
    sequence_parallel_tasks,
)
from tests.errors import assert_close

LENGTHS = [7, 1, 12]
COSTS = {"servers": 8, "query_bytes": 8192, "key_bytes": 4096}


def dense(q, k, v):
    """Block-diagonal causal attention by one mask."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    document, t = jnp.repeat(jnp.arange(3), jnp.array(LENGTHS), total_repeat_length=20), jnp.arange(20)
    sees = (document[:, None] == document[None]) & (t[:, None] >= t[None])
    s = jnp.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(jnp.where(sees, s, -jnp.inf)), v)


def cut_at_random(seed):
    """Queries and keys of each document cut anywhere, empty corners and all."""
    rng, tasks = np.random.default_rng(seed), []
    for i, n in enumerate(LENGTHS):
        edges = [[0, *sorted(rng.integers(0, n + 1, 2).tolist()), n] for _ in range(2)]
        tasks += [
            CoreTask(i, queries, keys, 0, 0)
            for queries in zip(edges[0][:-1], edges[0][1:], strict=True)
            for keys in zip(edges[1][:-1], edges[1][1:], strict=True)
        ]
    return [tasks[i] for i in rng.permutation(len(tasks)) if tasks[i].work]


def test_any_cut_is_exact_attention():
    q, k, v, weight = (
        jax.random.normal(jax.random.key(i), (20, heads, size))
        for i, (heads, size) in enumerate([(4, 5), (2, 5), (2, 3), (4, 3)])
    )
    loss = lambda f: jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) * weight), (0, 1, 2)))  # noqa: E731
    expected = loss(dense)(q, k, v)
    planned = balance_core_attention(LENGTHS, [0, 1, 2], servers=3, query_bytes=1, key_bytes=1)
    assert len(planned) > 3
    for tasks in (planned, cut_at_random(0)):
        got = loss(lambda q, k, v: core_attention(q, k, v, LENGTHS, tasks))(q, k, v)  # noqa: B023
        assert_close(got, expected, "float32")


def packed(seed, ranks=8, tokens=4096):
    """Documents of long-tailed lengths, cut where a rank is full: lengths and the rank of each."""
    rng, lengths, homes = np.random.default_rng(seed), [], []
    for rank in range(ranks):
        room = tokens
        while room:
            lengths.append(min(room, int(np.exp(rng.normal(5.5, 1.5))) + 1))
            homes.append(rank)
            room -= lengths[-1]
    return lengths, homes


@pytest.mark.parametrize("seed", range(3))
def test_servers_are_balanced_for_fewer_bytes_than_sequence_parallelism(seed):
    lengths, homes = packed(seed)
    at_home = [CoreTask(i, (0, n), (0, n), h, h) for i, (n, h) in enumerate(zip(lengths, homes, strict=True))]
    before = core_balance(at_home, **COSTS)
    tasks = balance_core_attention(lengths, homes, **COSTS, tolerance=0.02, block=16)
    after = core_balance(tasks, **COSTS)
    split = core_balance(sequence_parallel_tasks(lengths, 8), **COSTS)
    assert before.bytes == 0
    assert before.imbalance > 1.5
    assert after.imbalance < 1.1
    assert min(after.work) > 0.9 * sum(after.work) / 8
    assert sum(after.work) == sum(before.work) == sum(split.work)
    assert 0 < after.bytes < 0.5 * split.bytes
    for task in tasks:
        assert task.home == homes[task.document]
        assert task.keys == (0, task.queries[1])


def test_work_is_the_pairs_that_are_seen():
    for queries, keys in (((2, 5), (0, 5)), ((2, 5), (1, 4)), ((0, 3), (4, 7)), ((3, 9), (5, 6))):
        pairs = sum(i >= j for i in range(*queries) for j in range(*keys))
        assert CoreTask(0, queries, keys, 0, 0).work == pairs


def test_placed_documents_give_ranks_equal_tokens_and_work():
    for seed, ranks in ((0, 2), (1, 4), (2, 8)):
        lengths, _ = packed(seed, ranks=8, tokens=512)
        order = balanced_order(lengths, ranks)
        assert order.shape == (ranks, 4096 // ranks)
        assert sorted(order.reshape(-1).tolist()) == list(range(4096))
        seen = np.concatenate([np.arange(1, n + 1) for n in lengths])  # keys of each token
        work = seen[order].sum(1)
        assert work.max() < 1.01 * work.mean()
        assert (np.diff(order) > 0).all()


def test_what_can_not_be():
    x = jnp.ones((20, 1, 2))
    with pytest.raises(ValueError, match="lengths: got 8 tokens; expected 20, those of q"):
        core_attention(x, x, x, [8], [])
    with pytest.raises(ValueError, match="tasks: got 0 pairs of queries and keys; expected 107"):
        core_attention(x, x, x, LENGTHS, [])
    twice = [CoreTask(0, (0, 7), (0, 7), 0, 0)] * 2
    with pytest.raises(ValueError, match="expected each pair once"):
        core_attention(x, x, x, LENGTHS, twice)
    with pytest.raises(ValueError, match="expected places of its 1 tokens"):
        core_attention(x, x, x, LENGTHS, [CoreTask(1, (0, 2), (0, 2), 0, 0)])
    with pytest.raises(ValueError, match="homes: got 3; expected 0 to 1"):
        balance_core_attention([4], [3], servers=2, query_bytes=1, key_bytes=1)
    with pytest.raises(ValueError, match="ranks: got 3; expected a divisor of 20 tokens"):
        frugax.planner.balanced_order(LENGTHS, 3)
