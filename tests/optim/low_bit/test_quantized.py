"""Any transformation with its state in codes; weights in few bits whose updates are rounded at random."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from frugax.optim import apply_updates_stochastic, quantized_state, round_stochastic, state_bytes
from tests.errors import assert_close
from tests.kernels.quantized_update.definition import check_stored, decode


def test_adam_wrapped_follows_the_definition():
    """Every step of optax's Adam on the values that the codes before it stand for, stored again."""
    tx = quantized_state(optax.scale_by_adam(b2=0.99), {"mu": "dynamic8", "nu": "udynamic8"}, group_size=128)
    w = jnp.zeros((20, 300))
    state, step, rng = tx.init(w), jax.jit(tx.update), np.random.default_rng(0)
    for t in range(1, 11):
        g = 10 ** rng.uniform(-3, 0, w.shape) * rng.standard_normal(w.shape)
        g = np.float64(np.float32(g))
        update, new = step(jnp.asarray(g, jnp.float32), state)
        m, v = 0.9 * decode(state.mu) + 0.1 * g, 0.99 * decode(state.nu) + 0.01 * g * g
        check_stored(new.mu, m, f"step {t} mu")
        check_stored(new.nu, v, f"step {t} nu")
        want = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        assert_close(update, want, "float32", name=f"step {t}")
        state = new


def test_every_chain_and_format():
    """A chain with momentum, a trace in int4, extra arguments; what no name matches stays float32."""
    tx = quantized_state(
        optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale_by_adam()),
        {"trace": "int4", "mu": "mulaw8"},
        group_size=64,
        min_size=100,
    )
    tree = {"w": jax.random.normal(jax.random.key(0), (16, 256), jnp.float32), "b": jnp.ones(8, jnp.float32)}
    state = jax.jit(tx.init)(tree)
    assert state[1].trace["w"].codes.shape == (16, 128)
    assert state[1].trace["b"].dtype == jnp.float32
    assert state_bytes(state[2].mu["w"]) == 16 * 256 + 4 * 16 * 4
    assert state[2].nu["w"].dtype == jnp.float32
    first, after = jax.jit(tx.update)(tree, state, tree)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    exact = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale_by_adam())
    want, _ = jax.jit(exact.update)(tree, exact.init(tree), tree)
    assert_close(first, want, "float32")  # no moment was stored yet
    with pytest.raises(ValueError, match="format: got nue; expected names of fields"):
        quantized_state(optax.scale_by_adam(), {"mu": "int8", "nue": "int8"}).init(tree)


def test_parts_of_leaves():
    """An elementwise chain a part at a time is the chain: with odd sizes, vectors, int4, scalars, params."""
    chain = optax.chain(optax.trace(0.9), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    names = {"trace": "int4", "mu": "int8", "nu": "ufp8_e4m4"}
    shapes = {"odd": (13, 40), "stack": (2, 7, 30), "wide": (2, 300), "vector": (300,), "scale": ()}
    rng = np.random.default_rng(0)
    tree = {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}

    whole, parts = (quantized_state(chain, names, group_size=32, min_size=99, chunks=n) for n in (1, 3))
    gradient, step = jax.tree.map(lambda x: jnp.asarray(np.sin(x)), tree), jax.jit(whole.update)
    _, state = step(gradient, jax.jit(whole.init)(tree), tree)
    want, want_state = step(gradient, state, tree)
    got, got_state = jax.jit(parts.update)(gradient, state, tree)
    assert jax.tree.structure(got_state) == jax.tree.structure(want_state)
    assert_close(got, want, "float32")
    for a, b in zip(jax.tree.leaves(got_state), jax.tree.leaves(want_state), strict=True):
        assert a.dtype == b.dtype
        assert (
            np.abs(np.asarray(a, float) - np.asarray(b, float)) <= 1e-5 * np.abs(np.asarray(b, float))
        ).mean() > 0.99
    adafactor, w = quantized_state(optax.scale_by_factored_rms(), "int8", chunks=2), jnp.ones((256, 256))
    state = jax.eval_shape(adafactor.init, w)
    with pytest.raises(ValueError, match=r"chunks: inner's state has \[256\] at .*v_row"):
        jax.eval_shape(adafactor.update, w, state, w)


def test_parts_need_less_than_the_state_takes():
    """Temporaries of a step, gradients and state donated, over the bytes that the state keeps."""
    tree = {name: jax.ShapeDtypeStruct((512, 1024), jnp.float32) for name in "abcd"}

    def temporaries(chunks):
        tx = quantized_state(optax.scale_by_adam(), {"mu": "dynamic8", "nu": "udynamic8"}, chunks=chunks)
        state = jax.eval_shape(tx.init, tree)
        compiled = jax.jit(tx.update, donate_argnums=(0, 1)).lower(tree, state).compile()
        return compiled.memory_analysis().temp_size_in_bytes / state_bytes(state)

    assert temporaries(16) < 0.5
    assert temporaries(1) > 1.5  # the bound would notice


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_random_rounding_is_unbiased(dtype):
    """The mean of n draws lies within five standard errors; each draw is a neighbour; exact numbers stay."""
    n = 1000
    x = np.random.default_rng(0).standard_normal(50) * 10.0 ** np.arange(-4, 1).repeat(10)
    x = x.astype(np.float32)
    rounded = jax.jit(lambda x, key: round_stochastic(x, jnp.dtype(dtype), key))
    draws = np.asarray(rounded(np.tile(x, (n, 1)), jax.random.key(1)))
    drawn, x = np.asarray(draws, np.float64), np.asarray(x, np.float64)
    gap = 2.0 ** np.floor(np.log2(np.abs(x))) * float(jnp.finfo(dtype).eps)
    gap = np.maximum(gap, float(jnp.finfo(dtype).smallest_subnormal))
    assert (np.abs(drawn - x) <= gap).all()
    assert (drawn.std(0) > 0).mean() > 0.9
    assert (np.abs(drawn.mean(0) - x) < 5 * gap / 2 / np.sqrt(n)).all()
    same = np.tile(draws[0].astype(np.float32), (n, 1))
    np.testing.assert_array_equal(rounded(same, jax.random.key(2))[0], draws[0])


def test_small_updates_are_not_lost():
    """A hundred updates of a tenth of a code each: random rounding adds them up, the nearest code stalls."""
    w = jnp.ones((16, 256), jnp.bfloat16)
    quantize = jax.jit(lambda x: frugax.formats.quantize(x, "int8", group_size=64))
    q = quantize(np.linspace(0.5, 1, 16 * 256, dtype=np.float32).reshape(16, 256))
    tree = {"bfloat16": w, "int8": q, "float32": jnp.ones(3)}
    before = {"bfloat16": 1.0, "int8": np.asarray(q.dequantize()).mean(), "float32": 1.0}
    small = {
        "bfloat16": jnp.full(w.shape, 3e-4),
        "int8": jnp.full(q.shape, 3e-4),
        "float32": jnp.full(3, 3e-4),
    }

    @jax.jit
    def run(tree):
        def step(tree, key):
            return apply_updates_stochastic(tree, small, key), None

        return jax.lax.scan(step, tree, jax.random.split(jax.random.key(0), 100))[0]

    after = run(tree)
    assert after["bfloat16"].dtype == jnp.bfloat16
    assert after["int8"].codes.dtype == jnp.int8
    means = {n: np.asarray(x.dequantize() if n == "int8" else x, float).mean() for n, x in after.items()}
    for name, mean in means.items():
        assert abs(mean - before[name] - 0.03) < 1e-3, name
    nearest = quantize(np.asarray(q.dequantize()) + np.float32(3e-4))
    assert (np.asarray(nearest.codes) == np.asarray(q.codes)).mean() > 0.95
    assert jnp.bfloat16(1) + jnp.bfloat16(3e-4) == 1


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
    with pytest.raises(ValueError, match=r"updates: got \[4\] for a parameter \[3\]"):
        apply_updates_stochastic(jnp.ones(3), jnp.ones(4), jax.random.key(0))
