"""SlimFit's schedule against the rule, replayed in NumPy, and at its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim.layerwise import compressed
from tests.errors import assert_close, error
from tests.optim.optimizers import gradients

W = np.random.default_rng(0).normal(size=(4, 3, 2))
G = gradients((4, 3, 2), 20)
TREE = {"layers": {"a": jnp.asarray(W, jnp.float32), "b": 3 * jnp.ones((4, 5))}, "head": jnp.ones(3)}


def run(opt, steps):
    def step(carry, g):
        tree, state = carry
        gradient = {"layers": {"a": g, "b": jnp.sin(tree["layers"]["b"])}, "head": tree["head"]}
        updates, state = opt.update(gradient, state, tree)
        return (optax.apply_updates(tree, updates), state), optax.apply_updates(tree, updates)

    return jax.jit(lambda g: jax.lax.scan(step, (TREE, opt.init(TREE)), g)[1])(
        jnp.asarray(G[:steps], jnp.float32)
    )


def test_nothing_frozen_is_fine_tuning():
    inner = optax.adamw(0.1, weight_decay=0.1)
    assert_close(run(optim.slimfit(inner, 0.0), 10), run(inner, 10), "float32")


def mean_relative(u, w):
    """The authors' distance: |dW / W|, entry by entry."""
    return np.mean(np.abs(u / w))


@pytest.mark.parametrize("together", [False, True])
def test_the_layers_that_moved_least_rest(together):
    """Replayed in NumPy: weight tensors freeze one by one, or all of a block's together."""
    path = run(optim.slimfit(optax.sgd(0.1), 0.5, together=together), 20)
    both = np.concatenate([np.asarray(path["layers"][n]).reshape(20, 4, -1).sum(-1) for n in "ab"], axis=1)
    before = np.concatenate([np.asarray(TREE["layers"][n]).reshape(4, -1).sum(-1) for n in "ab"])
    weights = [[*W], [*np.full((4, 5), 3.0)]]
    many = 4 if together else 8
    distance, turns = np.full(many, np.inf), np.zeros(8)
    for t in range(20):
        active = np.zeros(many, bool)
        active[np.argsort(-distance, kind="stable")[: many // 2]] = True
        active = np.tile(active, 8 // many)
        np.testing.assert_array_equal(both[t] != before, active)  # the others keep every bit
        before, steps, olds = both[t], {}, {}
        for i in np.flatnonzero(active):
            w = olds[i] = weights[i // 4][i % 4]
            steps[i] = u = -0.1 * (G[t][i] if i < 4 else np.sin(w))
            weights[i // 4][i % 4] = w + u
        for i in steps:
            if not together:
                distance[i] = mean_relative(steps[i], olds[i])
            elif i < 4:
                u, w = (np.concatenate([x[i].ravel(), x[i + 4]]) for x in (steps, olds))
                distance[i] = mean_relative(u, w)
        turns += active
    assert (turns > 0).all()
    assert turns.max() > turns.min()


def test_distances_are_means_over_entries_without_the_zeros():
    """A mean over a tensor, or over all of a block: a layer of zeros has none alone, and one with others."""
    params = {"layers": {"a": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "b": jnp.full((2, 3), 0.5)}}
    ones = jax.tree.map(jnp.ones_like, params)
    for together, want in ((False, [0.05, np.inf, 0.2, 0.2]), (True, [(0.05 + 0.6) / 4, 0.2])):
        opt = optim.slimfit(optax.sgd(0.1), 0.0, together=together)
        _, state = jax.jit(opt.update)(ones, opt.init(params), params)
        np.testing.assert_allclose(state.distance, want, rtol=1e-6)


def test_what_always_trains_and_what_is_missing():
    opt = optim.slimfit(optax.sgd(0.1), 1.0)
    updates, _ = jax.jit(opt.update)(TREE, opt.init(TREE), TREE)
    assert not np.asarray(updates["layers"]["a"]).any()
    assert_close(updates["head"], -0.1 * np.ones(3), "float32")
    with pytest.raises(ValueError, match="params: got None"):
        opt.update(TREE, opt.init(TREE))
    with pytest.raises(ValueError, match="matches no leaf"):
        optim.slimfit(optax.sgd(0.1), 0.5, layers="blocks").init(TREE)


EXACT = {
    "gelu": (lambda x: compressed.gelu(x), lambda x: jax.nn.gelu(x, approximate=False)),
    "matmul": (lambda x: compressed.matmul(x, 1.3 * x[::-1].T), lambda x: x @ (1.3 * x[::-1].T)),
    "softmax_matmul": (
        lambda x: compressed.softmax_matmul(x @ x.T, x),
        lambda x: jax.nn.softmax(x @ x.T) @ x,
    ),
    "layer_norm": (
        lambda x: compressed.layer_norm(x, jnp.arange(1.0, 41.0), jnp.ones(40), share=0.9),
        lambda x: (
            (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * jnp.arange(1.0, 41.0)[None] + 1
        ),
    ),
}  # and how far a step of the format moves their gradient
PRECISION = {"gelu": 0.2, "matmul": 0.03, "softmax_matmul": 0.05, "layer_norm": 0.02}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_compressed_functions_are_exact_forwards_and_near_backwards(name):
    """Values are the definition's; gradients are within the format's step of it, and not exact."""
    ours, exact = EXACT[name]
    x = jnp.asarray(np.random.default_rng(3).standard_normal((35, 40)), jnp.float32)

    def run(f):
        y, pull = jax.vjp(f, x)
        return y, pull(jnp.cos(y))[0]

    (y, g), (want_y, want) = jax.jit(lambda: (run(ours), run(exact)))()
    assert_close(y, want_y, "float32")
    assert 1e-5 < error(g, want) < PRECISION[name]


def test_a_pruned_norm_keeps_the_largest_numbers_and_exact_gradients_of_its_scale():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20)), jnp.float32)
    g = np.random.default_rng(1).standard_normal((3, 20))
    scale, bias = jnp.linspace(0.5, 2, 20, dtype=jnp.float32), jnp.ones(20, jnp.float32)
    _, pull = jax.vjp(lambda *a: compressed.layer_norm(*a, share=0.1), x, scale, bias)
    of_x, of_scale, of_bias = pull(jnp.asarray(g, jnp.float32))
    wide = np.asarray(x, np.float64)
    y = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    assert_close(of_scale, (g * y).sum(0), "float32")
    assert_close(of_bias, g.sum(0), "float32")
    kept = np.where(np.argsort(np.argsort(-np.abs(y))) < 2, y, 0.0)
    inner = g * np.asarray(scale, np.float64)
    want = inner - inner.mean(-1, keepdims=True) - kept * (inner * kept).mean(-1, keepdims=True)
    assert_close(of_x, want / wide.std(-1, keepdims=True), "float32")


def test_what_compressed_functions_keep():
    """Bytes for the backward pass, of float32 arrays of n numbers: n / 2, 2 n, 2 n, a tenth with places."""
    x = jnp.ones((32, 64), jnp.float32)
    kept = {
        "gelu": lambda: compressed._gelu_forward(x)[1],
        "matmul": lambda: compressed._matmul_forward(x, x.T)[1],
        "softmax_matmul": lambda: compressed._softmax_matmul_forward(x, x.T)[1],
        "layer_norm": lambda: compressed._normalized_forward(x, 6, 1e-12)[1],
    }
    size = lambda x: x.size * x.dtype.itemsize  # noqa: E731
    sizes = {k: sum(map(size, jax.tree.leaves(jax.eval_shape(f)))) for k, f in kept.items()}
    n = x.size
    assert sizes == {"gelu": n // 2, "matmul": 2 * n, "softmax_matmul": 2 * n, "layer_norm": 32 * (6 * 6 + 4)}
