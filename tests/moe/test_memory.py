"""Memories by document: a wider GLU, gradients and steps of fetched nodes alone, one path resident."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import layers, moe
from tests.errors import assert_close

D, M, NODES, HIDDEN = 7, 9, (2, 6), (4, 5)
PATH = np.array([[1, 3], [1, 5], [0, 2], [1, 3]], jnp.int32)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def filled(tree):
    """The tree with random numbers in place of zeros."""
    return jax.tree.map(lambda x: normal(*x.shape), tree)


def bank_like(memory, nodes):
    """The shapes of a fresh bank, filled."""
    return filled(jax.eval_shape(lambda: moe.memory_bank(jax.random.key(1), memory, nodes, HIDDEN)))


@functools.cache
def whole(layer):
    """The layer on what a path fetches, as one program for each shape of the path."""
    return jax.jit(
        lambda params, bank, path, x: layer.apply({"params": params, "memory": moe.fetch(bank, path)}, x)
    )


@pytest.fixture(scope="module")
def case():
    layer, x = layers.MemoryGLU(expand=2), normal(4, 3, D)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    bank = bank_like(variables["memory"], NODES)
    return layer, variables["params"], bank, x


def test_a_memory_is_more_hidden_units(case):
    """Of each document: one dense GLU in float64 whose hidden units are the layer's and its nodes'."""
    layer, params, bank, x = case
    y = np.asarray(whole(layer)(params, bank, PATH, x))
    gate_in, out = (np.asarray(params[name]["kernel"], np.float64) for name in ("gate_in", "out"))
    for document, path in enumerate(np.asarray(PATH)):
        blocks = [
            {name: np.asarray(level[name][node], np.float64) for name in ("gate_in", "out")}
            for node, level in zip(path, bank, strict=True)
        ]
        halves = [np.split(w, 2, 1) for w in (gate_in, *(b["gate_in"] for b in blocks))]
        gates, values = (np.concatenate([h[i] for h in halves], 1) for i in (0, 1))
        wide = np.concatenate([out, *(b["out"] for b in blocks)], 0)
        rows = np.asarray(x[document], np.float64)
        gate = rows @ gates
        assert_close(y[document], (gate / (1 + np.exp(-gate)) * (rows @ values)) @ wide, jnp.float32)
    plain, same = (jax.jit(each.apply)({"params": params}, x) for each in (layers.GLU(expand=2), layer))
    np.testing.assert_array_equal(same, plain)
    memory = jax.eval_shape(layer.init, jax.random.key(0), x)["memory"]
    fresh = jax.jit(lambda key: moe.memory_bank(key, memory, NODES, HIDDEN))(jax.random.key(2))
    assert_close(whole(layer)(params, fresh, PATH, x), plain, "float32")
    assert 0.5 * D**-0.5 < np.std(fresh[1]["gate_in"]) < 1.5 * D**-0.5


def test_gradients_and_steps_reach_the_fetched_nodes_alone(case):
    """The sparse step is Adam's on each node by itself, as if steps without the node had not been."""
    layer, params, bank, x = case
    apart = jax.jit(lambda path: moe.distinct_nodes(path, NODES))
    nodes, local = apart(PATH)
    assert [np.asarray(n).tolist()[:2] for n in nodes] == [[0, 1], [2, 3]]

    def loss(bank, path):
        return jnp.mean(layer.apply({"params": params, "memory": moe.fetch(bank, path)}, x) ** 2)

    @jax.jit
    def both(bank, nodes, local):
        of_part = jax.value_and_grad(loss)(moe.take_nodes(bank, nodes), local)
        return *jax.value_and_grad(loss)(bank, jnp.asarray(PATH)), *of_part

    value, grads, mine, sparse = both(bank, nodes, local)
    np.testing.assert_allclose(mine, value, rtol=1e-6)
    dense_of, few_of = jax.device_get((grads, sparse))
    for level, (dense, few) in enumerate(zip(dense_of, few_of, strict=True)):
        fetched = np.isin(np.arange(NODES[level]), PATH[:, level])
        for name in ("gate_in", "out"):
            moved = np.abs(dense[name]).reshape(NODES[level], -1).max(-1) > 0
            np.testing.assert_array_equal(moved, fetched)
            some = np.asarray(nodes[level])[: fetched.sum()]
            np.testing.assert_allclose(few[name][: len(some)], dense[name][some], rtol=1e-5, atol=1e-7)

    optimizer = optax.adamw(0.1, weight_decay=0.1)
    state = jax.jit(lambda bank: moe.init_nodes(optimizer, bank))(bank)
    step = jax.jit(lambda g, s, b, n: moe.update_nodes(optimizer, g, s, b, n))
    first, state = step(sparse, state, bank, nodes)
    alone = apart(PATH[2:3])[0]  # then nodes 0 and 2 once more
    some = jax.jit(moe.take_nodes)(grads, alone)
    second, state = jax.device_get(step(some, state, first, alone))

    @jax.jit
    def once(g, s, p):
        updates, s = optimizer.update(g, s, p)
        return optax.apply_updates(p, updates), s

    bank, fresh = jax.device_get(bank), jax.jit(optimizer.init)
    assert state[1][0].count.tolist() == [0, 0, 2, 1, 0, 1]
    for level in (0, 1):
        for node, count in enumerate(state[level][0].count.tolist()):
            p, g = (jax.tree.map(lambda a, i=node: a[i], t[level]) for t in (bank, dense_of))
            s = fresh(p)
            for _ in range(count):
                p, s = once(g, s, p)
            for name in ("gate_in", "out"):
                got, was = second[level][name][node], bank[level][name][node]
                np.testing.assert_allclose(got, p[name], rtol=1e-5, atol=1e-6)
                assert bool((got == was).all()) == (count == 0)


def test_a_decoder_holds_the_anchor_and_one_path():
    """Memories pass through the scan over depth; what a call holds doesn't grow with the bank."""
    block = layers.Block("MLGRU", "MemoryGLU", channel_args={"expand": 2})
    model = layers.Decoder(vocab_size=11, width=8, blocks=(block,), repeats=2)
    tokens = RNG.integers(0, 11, (2, 5), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    params = variables["params"]
    bank = bank_like(variables["memory"], (3, 12))
    fetch = jax.jit(moe.fetch)
    memory = fetch(bank, np.array([[0, 2], [2, 11]]))

    run = jax.jit(lambda variables, tokens: model.apply(variables, tokens)[0])
    both = run({"params": params, "memory": memory}, tokens)
    one = fetch(bank, np.array([[2, 11]]))
    alone = run.lower({"params": params, "memory": one}, tokens[1:]).compile()
    both = np.asarray(both)
    assert_close(both[1:], alone({"params": params, "memory": one}, tokens[1:]), jnp.float32)
    assert np.abs(both - run({"params": params}, tokens)).max() > 0.01

    size = sum(p.nbytes for p in jax.tree.leaves(params)) + 2 * 3 * 8 * sum(HIDDEN) * 4
    assert size <= alone.memory_analysis().argument_size_in_bytes <= size + 64  # the tokens too
    assert sum(p.nbytes for p in jax.tree.leaves(bank)) > 5 * 2 * 3 * 8 * sum(HIDDEN) * 4


@pytest.mark.nan
def test_nodes_that_are_not_there_give_nan(case):
    layer, params, bank, x = case
    for path in ([[1, 6]], [[-1, -1]]):
        assert np.isnan(whole(layer)(params, bank, np.array(path), x)).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda bank, apply: moe.fetch(bank, PATH[:, :1]), r"path: got int32\[4, 1\]; expected .* 2 levels"),
        (
            lambda bank, apply: apply(moe.fetch(bank, PATH[:3])),
            r"gate_in \[3, 7, 18\].*expected \[4 or 1, 7,",
        ),
        (lambda bank, apply: apply(moe.fetch(bank, PATH), True), "memory: got one for a ternary layer"),
        (lambda bank, apply: moe.memory_bank(jax.random.key(0), {}, (2,), (3,)), "memory: got no layers"),
        (
            lambda bank, apply: moe.memory_bank(jax.random.key(0), bank[0], (2, 4), (3,)),
            r"nodes, hidden: got \(2, 4\), \(3,\)",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(case, call, says):
    layer, params, bank, x = case

    def apply(memory, ternary=False):
        return layer.clone(ternary=ternary).apply({"params": params, "memory": memory}, x)

    with pytest.raises(ValueError, match=says):
        call(bank, apply)
