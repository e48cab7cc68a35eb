"""Estimates of memory: the compiler's own where they can be exact, and by hand."""

import jax
import jax.numpy as jnp
import optax
import pytest

import frugax
from frugax.planner import liveness


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def elements(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


def compiled(f, *args, donate=()):
    """Bytes that the compiler asks for: arguments, new outputs, temporaries."""
    found = jax.jit(f, donate_argnums=donate).lower(*args).compile().memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes, new, found.temp_size_in_bytes


X = f32(64, 64)
N = 4 * 64 * 64
CASES = {
    # name: (function, donated, temporaries by hand in units of N)
    "a product is stored, its sine takes its place": (lambda x: jnp.sin(x @ x) @ x, (), 1),
    "elementwise work is not stored": (lambda x: jnp.sum(jnp.exp(x) * 2 - x), (), 0),
    "a value lives until its last reader": (lambda x: ((y := x @ x) @ x) @ y, (), 2),
    "what nobody reads is not there": (lambda x: (x @ x, x + 1)[1], (), 0),
    "calls are inlined": (lambda x: jax.jit(lambda x: x @ x)(x) @ x, (), 1),
    "views take nothing": (lambda x: (x @ x).T.reshape(32, 2, 64).reshape(64, 64) @ x, (), 1),
    "a donated argument holds the result": (lambda x: x + 1, (0,), 0),
    "a loop's carry stays in place": (
        lambda x: jax.lax.fori_loop(0, 5, lambda _, c: jnp.tanh(c), x @ x) @ x, (), 1,
    ),
    "stacked results of a loop": (
        lambda x: jnp.tanh(jax.lax.scan(lambda c, _: (c + 1, c), x[0], length=64)[1]) @ x, (), 1,
    ),
    "a loop of one iteration is none": (
        lambda x: jax.lax.scan(lambda c, y: (c, y @ c), x, x[None] @ x)[1][0] @ x, (), 2,
    ),
    "the larger branch": (
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: ((x @ x) @ x) @ x, lambda x: x, x), (), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_lives_by_hand(name):
    f, donated, units = CASES[name]
    found = liveness(f, X, donate_argnums=donated)
    assert N * units <= found.temporaries < N * units + 2048
    assert found.arguments == N
    assert found.outputs in ((0,) if donated else (4, N))
    assert max((held for _, held in found.timeline), default=0) == found.temporaries


def step_of(block, layers, width, rows, *, scan):
    """One step of Adam on a stack of blocks."""
    optimizer = optax.adam(1e-3)
    params = f32(layers, width, width) if scan else [f32(width, width)] * layers

    def loss(params, x):
        if scan:
            x = jax.lax.scan(lambda x, w: (block(x, w), None), x, params)[0]
        else:
            for w in params:
                x = block(x, w)
        return jnp.mean(x**2)

    def step(params, state, x):
        value, grads = jax.value_and_grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, (params, jax.eval_shape(optimizer.init, params), f32(rows, width))


@pytest.mark.parametrize("case", ["scan", "remat", pytest.param("whole", marks=pytest.mark.full)])
def test_a_training_step_is_near_the_compilers(case):
    block = lambda x, w: x + jnp.tanh(x @ w) @ w  # noqa: E731
    block = jax.checkpoint(block) if case == "remat" else block
    step, args = step_of(block, 6, 32, 512, scan=case != "whole")
    found = liveness(step, *args, donate_argnums=(0, 1))
    arguments, _, temporaries = compiled(step, *args, donate=(0, 1))
    assert found.arguments == arguments
    assert found.outputs == 4  # the loss; all else was donated
    total = arguments + temporaries
    assert abs(found.peak / total - 1) < 0.35, (found[:3], arguments, temporaries)
    if case == "remat":
        plain, _ = step_of(lambda x, w: x + jnp.tanh(x @ w) @ w, 6, 32, 512, scan=True)
        assert found.temporaries < 0.7 * liveness(plain, *args, donate_argnums=(0, 1)).temporaries


def test_formulas_count_real_arrays():
    """Params and states are those of a real tree; what a block keeps is what one more block adds."""
    width, time, heads = 24, 10, 3
    planner = frugax.planner

    def block(x, p):
        norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)  # noqa: E731
        q, k, v = (a.reshape(time, heads, -1) for a in jnp.split(norm(x) @ p["qkv"], 3, -1))
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
        x = x + jnp.einsum("hts,shd->thd", weights, v).reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]

    params = {
        "qkv": f32(width, 3 * width), "out": f32(width, width),
        "up": f32(width, 4 * width), "down": f32(4 * width, width),
    }  # fmt: skip
    layer = planner.transformer_block(width, time=time, heads=heads)
    found = planner.training_bytes([layer] * 2, batch=5)
    assert found.params == found.gradients == 2 * 4 * elements(params)
    state = jax.eval_shape(optax.scale_by_adam().init, params)
    assert found.optimizer == 2 * 4 * (elements(state) - 1)  # without the count

    def loss(blocks, x):
        for p in blocks:
            x = block(x, p)
        return jnp.sum(x)

    few, many = (liveness(jax.grad(loss), [params] * n, f32(time, width)).temporaries for n in (2, 5))
    assert layer.kept * 4 == pytest.approx((many - few) / 3, rel=0.25)
    again = planner.training_bytes([layer] * 2, batch=5, rematerialize=True)
    assert again.activations == 4 * 5 * (2 * time * width + layer.kept)
    assert found.total == sum(found)
    with pytest.raises(ValueError, match="batch: got 0; expected at least 1"):
        planner.training_bytes([layer], batch=0)
    with pytest.raises(ValueError, match="donate_argnums: got 3; expected positions of 1 arguments"):
        liveness(lambda x: x, X, donate_argnums=3)
