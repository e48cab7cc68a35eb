"""Memories by document: a wider GLU, gradients and steps of fetched nodes alone, one path resident."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import layers, moe
from tests.errors import assert_close

D, M, NODES, HIDDEN = 7, 9, (2, 6), (4, 5)
PATH = jnp.array([[1, 3], [1, 5], [0, 2], [1, 3]])
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def filled(tree):
    """The tree with random numbers in place of zeros."""
    return jax.tree.map(lambda x: normal(*x.shape), tree)


@pytest.fixture(scope="module")
def case():
    layer, x = layers.MemoryGLU(expand=2), normal(4, 3, D)
    variables = layer.init(jax.random.key(0), x)
    bank = filled(moe.memory_bank(jax.random.key(1), variables["memory"], NODES, HIDDEN))
    return layer, variables["params"], bank, x


def test_a_memory_is_more_hidden_units(case):
    """Of each document: one dense GLU in float64 whose hidden units are the layer's and its nodes'."""
    layer, params, bank, x = case
    y = layer.apply({"params": params, "memory": moe.fetch(bank, PATH)}, x)
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
    plain = layers.GLU(expand=2).apply({"params": params}, x)
    np.testing.assert_array_equal(layer.apply({"params": params}, x), plain)
    fresh = moe.memory_bank(jax.random.key(2), layer.init(jax.random.key(0), x)["memory"], NODES, HIDDEN)
    np.testing.assert_array_equal(layer.apply({"params": params, "memory": moe.fetch(fresh, PATH)}, x), plain)
    assert 0.5 * D**-0.5 < float(jnp.std(fresh[1]["gate_in"])) < 1.5 * D**-0.5


def test_gradients_and_steps_reach_the_fetched_nodes_alone(case):
    """The sparse step is Adam's on each node by itself, as if steps without the node had not been."""
    layer, params, bank, x = case
    nodes, local = moe.distinct_nodes(PATH, NODES)
    assert [n.tolist()[:2] for n in nodes] == [[0, 1], [2, 3]]

    def loss(bank, path):
        return jnp.mean(layer.apply({"params": params, "memory": moe.fetch(bank, path)}, x) ** 2)

    value, grads = jax.jit(jax.value_and_grad(loss))(bank, PATH)
    part = moe.take_nodes(bank, nodes)
    mine, sparse = jax.jit(jax.value_and_grad(loss))(part, local)
    np.testing.assert_allclose(mine, value, rtol=1e-6)
    for level, (dense, few) in enumerate(zip(grads, sparse, strict=True)):
        fetched = np.isin(np.arange(NODES[level]), PATH[:, level])
        for name in ("gate_in", "out"):
            moved = np.abs(np.asarray(dense[name])).reshape(NODES[level], -1).max(-1) > 0
            np.testing.assert_array_equal(moved, fetched)
            some = np.asarray(nodes[level])[: fetched.sum()]
            np.testing.assert_allclose(few[name][: len(some)], dense[name][some], rtol=1e-5, atol=1e-7)

    optimizer = optax.adamw(0.1, weight_decay=0.1)
    state = moe.init_nodes(optimizer, bank)
    step = jax.jit(lambda g, s, b, n: moe.update_nodes(optimizer, g, s, b, n))
    first, state = step(sparse, state, bank, nodes)
    alone = moe.distinct_nodes(PATH[2:3], NODES)[0]  # then nodes 0 and 2 once more
    second, state = step(moe.take_nodes(grads, alone), state, first, alone)
    assert state[1][0].count.tolist() == [0, 0, 2, 1, 0, 1]
    for level in (0, 1):
        for node, count in enumerate(state[level][0].count.tolist()):
            p, g = (jax.tree.map(lambda a, i=node: a[i], t[level]) for t in (bank, grads))
            s = optimizer.init(p)
            for _ in range(count):
                updates, s = optimizer.update(g, s, p)
                p = optax.apply_updates(p, updates)
            for name in ("gate_in", "out"):
                got, was = second[level][name][node], bank[level][name][node]
                np.testing.assert_allclose(got, p[name], rtol=1e-5, atol=1e-6)
                assert bool((got == was).all()) == (count == 0)


def test_a_decoder_holds_the_anchor_and_one_path():
    """Memories pass through the scan over depth; what a call holds doesn't grow with the bank."""
    block = layers.Block("MLGRU", "MemoryGLU", channel_args={"expand": 2})
    model = layers.Decoder(vocab_size=11, width=8, blocks=(block,), repeats=2)
    tokens = jnp.asarray(RNG.integers(0, 11, (2, 5)))
    variables = model.init(jax.random.key(0), tokens)
    params = variables["params"]
    bank = filled(moe.memory_bank(jax.random.key(1), variables["memory"], (3, 12), HIDDEN))
    memory = moe.fetch(bank, jnp.array([[0, 2], [2, 11]]))

    run = jax.jit(lambda variables, tokens: model.apply(variables, tokens)[0])
    both = run({"params": params, "memory": memory}, tokens)
    one = moe.fetch(bank, jnp.array([[2, 11]]))
    alone = run.lower({"params": params, "memory": one}, tokens[1:]).compile()
    assert_close(both[1:], alone({"params": params, "memory": one}, tokens[1:]), jnp.float32)
    assert float(jnp.abs(both - run({"params": params}, tokens)).max()) > 0.01

    size = sum(p.nbytes for p in jax.tree.leaves(params)) + 2 * 3 * 8 * sum(HIDDEN) * 4
    assert size <= alone.memory_analysis().argument_size_in_bytes <= size + 64  # the tokens too
    assert sum(p.nbytes for p in jax.tree.leaves(bank)) > 5 * 2 * 3 * 8 * sum(HIDDEN) * 4


def test_nodes_that_are_not_there_give_nan(case):
    layer, params, bank, x = case
    for path in ([[1, 6]], [[-1, -1]]):
        y = layer.apply({"params": params, "memory": moe.fetch(bank, jnp.array(path))}, x)
        assert np.isnan(y).all()


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
