"""Gradients of active layers alone: the exact ones, in less memory, for any loss that scans over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from tests.errors import assert_close, error
from tests.optim.layerwise.models import perceptron, temporaries, transformer


def chosen(tree, active):
    return tree | {"layers": jax.tree.map(lambda x: np.asarray(x)[active], tree["layers"])}


@pytest.fixture(scope="module")
def small():
    """A transformer of four blocks, and its loss and gradient by ordinary differentiation."""
    params, loss = transformer(depth=4, width=8, time=5)
    return params, loss, *jax.jit(jax.value_and_grad(loss))(params)


def test_the_gradient_is_that_of_all_layers_where_they_are_active(small):
    """For several sets of active layers in one compiled program, and for what is not stacked."""
    params, loss, value, exact = small
    part = jax.jit(lambda p, active: optim.active_value_and_grad(loss, p, active))
    for active in ([0, 3], [1, 2]):
        got_value, got = part(params, jnp.array(active))
        assert_close(got_value, value, "float32")
        assert_close(got, chosen(exact, active), "float32")


@pytest.mark.parametrize("keep", ["int8", pytest.param("int4", marks=pytest.mark.full)])
def test_activations_in_few_bits_give_the_gradient_to_their_precision(small, keep):
    params, loss, _, exact = small
    _, got = jax.jit(lambda p: optim.active_value_and_grad(loss, p, jnp.array([1, 3]), keep=keep))(params)
    errors = jax.tree.leaves(jax.tree.map(error, got, chosen(exact, [1, 3])))
    # The first layer's gradient passes four layers with four stored activations in a row each, which add up
    # as independent errors do: sqrt(16) times the error of one, that of the format on normal numbers.
    assert max(errors) < 4 * {"int8": 0.0065, "int4": 0.10}[keep]
    assert max(errors) > 1e-4  # they are in few bits


def test_no_weight_gradient_of_a_frozen_layer_is_computed():
    """Each layer's own number passes by when its weights' gradient is taken: those of the active ones do."""
    seen = []

    @jax.custom_vjp
    def told(w, number):
        return w

    def tell(number, g):
        back = lambda n, g: (seen.append(int(n)), np.asarray(g))[1]  # noqa: E731
        return jax.pure_callback(back, jax.ShapeDtypeStruct(g.shape, g.dtype), number, g), None

    told.defvjp(lambda w, number: (w, number), tell)
    w = jnp.ones((5, 3, 3), jnp.float32) / 4

    def loss(p):
        layer = lambda h, x: (jnp.tanh(h @ told(x[0], x[1])), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(layer, jnp.ones(3, jnp.float32), (p["layers"]["w"], jnp.arange(5)))[0])

    part = jax.jit(lambda p, active: optim.active_value_and_grad(loss, p, active)[1])
    got = jax.block_until_ready(part({"layers": {"w": w}}, jnp.array([1, 3])))
    assert sorted(seen) == [1, 3]
    assert got["layers"]["w"].any((1, 2)).all()


def memory_of_one_block(slim=False, **how):
    """Temporaries with 7 of 8 layers frozen, of those that training all takes."""
    params, loss = transformer(width=64, time=32)
    full = temporaries(jax.grad(loss), params)
    loss = transformer(width=64, time=32, slim=slim)[1]
    active = jnp.array([5])
    return temporaries(lambda p, a: optim.active_value_and_grad(loss, p, a, **how)[1], params, active) / full


def test_frozen_layers_keep_no_activations_and_no_gradient():
    """SlimFit's functions in 8 and 4 bits: a third of the temporaries of training all."""
    assert memory_of_one_block(slim=True) < 0.4


@pytest.mark.full
def test_activations_kept_in_other_ways_take_less_memory(small):
    """Any model, without functions of its own: products alone, exactly, or fewer bits."""
    exact, dots, eight, four = (memory_of_one_block(keep=keep) for keep in (None, "dots", "int8", "int4"))
    assert dots < 0.6
    assert four < eight < 0.5 < exact < 0.9
    params, loss, value, gradient = small
    active = jnp.array([0, 2])
    got_value, got = jax.jit(lambda p: optim.active_value_and_grad(loss, p, active, keep="dots"))(params)
    assert_close(got_value, value, "float32")
    assert_close(got, chosen(gradient, active), "float32")


@pytest.mark.nan
@pytest.mark.parametrize("make", [optim.lisa, pytest.param(optim.badam, marks=pytest.mark.full)])
def test_a_step_in_the_memory_of_the_active_layers(make):
    """Temporaries of a whole step with one of 8 layers active, of those of a step by all gradients."""
    params, loss = perceptron(depth=8)
    optimizer = make(0.01, **({"active": 1} if make is optim.lisa else {}))
    state = optimizer.init(params)

    def of_all(p, s):
        updates, s = optimizer.update(jax.grad(loss)(p), s, p)
        return optax.apply_updates(p, updates), s

    def of_active(p, s):
        return optim.layerwise_step(optimizer, loss, p, s)[:2]

    every = temporaries(of_all, params, state, donate_argnums=(0, 1))
    assert temporaries(of_active, params, state, donate_argnums=(0, 1)) < 0.5 * every
    assert every > 0.9 * params["layers"]["w"].nbytes


OPTIMIZERS = {
    "lisa": lambda: optim.lisa(0.02, active=2, update_interval=2, weight_decay=0.1),
    "badam": lambda: optim.badam(0.02, update_interval=1, weight_decay=0.1, order="random"),
    "slimfit": lambda: optim.slimfit(optax.adamw(0.02), 0.5, together=True),
}


@pytest.mark.parametrize("name", ["lisa", "slimfit", pytest.param("badam", marks=pytest.mark.full)])
def test_a_layerwise_step_is_the_ordinary_step(name):
    """Six steps by either way: the same params and state, for draws, turns and schedules alike."""
    params, loss = perceptron(width=6)
    optimizer = OPTIMIZERS[name]()

    @jax.jit
    def ordinary(carry):
        p, s = carry
        updates, s = optimizer.update(jax.grad(loss)(p), s, p)
        return optax.apply_updates(p, updates), s

    @jax.jit
    def layerwise(carry):
        p, s, _ = optim.layerwise_step(optimizer, loss, *carry)
        return p, s

    first = second = (params, optimizer.init(params))
    moved = set()
    for _ in range(6):
        before, first, second = first[0], ordinary(first), layerwise(second)
        changed = (first[0]["layers"]["w"] != before["layers"]["w"]).any((1, 2))
        moved |= set(np.flatnonzero(changed).tolist())
    assert_close(second[0], first[0], "float32", times=10)
    assert jax.tree.structure(second) == jax.tree.structure(first)
    assert len(moved) > 2


@pytest.mark.full
def test_a_decoder_trains_by_active_layers():
    """flax's nn.scan, as this library's decoders have it."""
    import frugax

    block = frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2}, {"expand": 2.0})
    module = frugax.layers.Decoder(17, 8, (block,), repeats=4, backend="xla")
    tokens = jnp.arange(12).reshape(2, 6) % 17
    params = jax.jit(module.init)(jax.random.key(0), tokens)["params"]

    def loss(params):
        logits, _ = module.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in
             jax.tree_util.tree_leaves_with_path(params)}  # fmt: skip
    assert any("layers/" in path for path in paths), paths
    active = jnp.array([0, 2])
    value, got = jax.jit(lambda p: optim.active_value_and_grad(loss, p, active))(params)
    exact_value, exact = jax.jit(jax.value_and_grad(loss))(params)
    assert_close(value, exact_value, "float32")
    picked = [g if len(g) != 4 else g[active] for g in jax.tree.leaves(exact)]
    for a, b in zip(jax.tree.leaves(got), picked, strict=True):
        if np.asarray(b).any():
            assert_close(a, b, "float32", times=10)
        else:
            assert not np.asarray(a).any()


def test_leaves_read_in_other_ways():
    """By index, at each step of a scan over time, in two scans, backwards: right, if not for less memory."""
    params = {"layers": {"w": jnp.arange(1.0, 37.0).reshape(4, 3, 3) / 40}}
    x = jnp.linspace(-1, 1, 6).reshape(2, 3)

    def layer(h, w):
        h, key = h
        return (jnp.tanh(h @ w) + 0.1 * jax.random.normal(key, (3,)), jax.random.fold_in(key, 1)), None

    def loss(p):
        w, start = p["layers"]["w"], (jnp.zeros(3), jax.random.key(0))

        def step(h, x):
            return jax.lax.scan(layer, (h + x, start[1]), w)[0][0], None

        over_time, _ = jax.lax.scan(step, start[0], x)
        (up, _), _ = jax.lax.scan(layer, (x[0], start[1]), w)
        (down, _), _ = jax.lax.scan(layer, (x[1], start[1]), w, reverse=True)
        return jnp.sum(over_time) + jnp.sum(up * down) + jnp.sum(jnp.sin(w[0] * w[2]))

    active = jnp.array([1, 2])
    exact, got = jax.jit(
        lambda p: (jax.grad(loss)(p)["layers"]["w"][active], optim.active_value_and_grad(loss, p, active)[1])
    )(params)
    assert_close(got["layers"]["w"], exact, "float32")


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
    params, loss = perceptron(depth=2, width=3)
    with pytest.raises(ValueError, match="layers: 'blocks' matches no leaf"):
        optim.active_value_and_grad(loss, params, jnp.array([0]), layers="blocks")
    with pytest.raises(ValueError, match="optimizer: got GradientTransformation"):
        optim.layerwise_step(optax.sgd(0.1), loss, params, None)
    with pytest.raises(ValueError, match="order: got 'sideways'"):
        optim.badam(0.1, order="sideways")
    with pytest.raises(ValueError, match=r"stacks of \[2, 3\] layers"):
        optim.slimfit(optax.sgd(0.1), 0.5, together=True).init(
            {"layers": {"a": jnp.ones((2, 4)), "b": jnp.ones((3, 4))}}
        )
