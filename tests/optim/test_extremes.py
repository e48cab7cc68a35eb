"""Numbers at the ends of their range: small second moments, vanished gradients, complex or narrow params."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax import optim
from frugax.optim import EightBit
from tests.errors import assert_close
from tests.optim.optimizers import CASES


def sizes(gradient_of_step, opt, steps):
    """The norm of each update [steps], for gradients by step."""
    w = {"kernel": jnp.zeros((8, 16), jnp.float32)}

    def step(state, i):
        g = {"kernel": gradient_of_step(i)}
        updates, state = opt.update(g, state, w)
        return state, jnp.linalg.norm(updates["kernel"].astype(jnp.float32))

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, opt.init(w), jnp.arange(steps))[1])())


@pytest.mark.parametrize("make", [optim.apollo, optim.fira])
def test_updates_come_back_after_gradients_vanished(make):
    """A limit of 1.01 on growth alone would take more than 900 steps after a hundred tiny gradients."""
    g = jax.random.normal(jax.random.key(0), (8, 16), jnp.float32)
    vanished = lambda i: g * jnp.where((i >= 20) & (i < 120), 1e-6, 1.0)  # noqa: E731
    norm = sizes(vanished, make(1.0, rank=2, update_interval=1000), 520)
    assert norm[100] < 0.2 * norm[19]
    assert (norm[500:] > 0.9 * norm[19]).all()
    if make is optim.apollo:  # yet not at once: the limit holds, of the whole update
        assert norm[120] < 0.2 * norm[19]
        assert (norm[121:] <= 1.02 * np.maximum(norm[120:-1], 0.5 * norm[19])).all()


def test_no_second_moment_becomes_zero():
    """With int8's zeros, gradients at 1/50 of the largest would get updates of 100,000 times Adam's.

    The formats that are taken keep updates below Adam's where they don't keep the moment's digits.
    """
    with pytest.raises(ValueError, match=r"format: got int8 for a second moment.*expected ufp8_e4m4"):
        optim.quantized_state(optax.scale_by_adam(), "int8", min_size=1).init(jnp.zeros((2, 256)))
    size = np.logspace(-5, 0, 256)
    noise = np.random.default_rng(0).normal(size=(200, 4, 256))

    def updates(rule):
        step = lambda state, g: rule.update(g, state)[::-1]  # noqa: E731
        return np.asarray(jax.jit(lambda g: jax.lax.scan(step, rule.init(g[0]), g)[1])(gradients))[-100:]

    gradients = jnp.asarray(size * noise, jnp.float32)
    rms = lambda x: np.sqrt(np.mean(x**2, axis=(0, 1)))  # noqa: E731
    exact = updates(optax.scale_by_adam())
    wrapped = {
        nu: optim.quantized_state(optax.scale_by_adam(), {"mu": "dynamic8", "nu": nu}, min_size=1)
        for nu in ("udynamic8", "ufp8_e4m4")
    }
    papers = EightBit(signed="dynamic8", unsigned="udynamic8", min_size=1)
    rules = wrapped | {"papers": optim.scale_by_adam_8bit(moments=papers)}
    rules |= {"default": optim.scale_by_adam_8bit(moments=EightBit(min_size=1))}
    for name, rule in rules.items():
        got = updates(rule)
        assert (rms(got) < 2 * rms(exact)).all(), name
        if name == "default":  # what `EightBit` says of its range
            off = rms(got - exact) / rms(exact)
            assert off[size > 1 / 200].mean() < 0.1
            assert (rms(got) / rms(exact) > 0.15)[size > 1e-3].all()


def test_lion_of_complex_numbers():
    """Norms are of magnitudes: the gradient of the 2-norm has norm 1."""
    z = np.asarray([[3 + 4j, -1j], [0.5, 2 - 2j]], np.complex64)
    wanted = {
        "l1": z / np.abs(z),
        "l2": z / np.sqrt(np.sum(np.abs(z) ** 2)),
        "group": z / np.sqrt(np.sum(np.abs(z) ** 2, axis=0, keepdims=True)),
        optim.kappas.huber(3.0): z / np.maximum(np.abs(z), 3.0),
        optim.kappas.lp(3.0): z * np.abs(z) / np.sum(np.abs(z) ** 3) ** (2 / 3),
    }
    for kappa, want in wanted.items():
        rule = optim.scale_by_lion_k(kappa, b1=0.0)
        got, _ = jax.jit(lambda z, rule=rule: rule.update(z, rule.init(z)))(z)
        assert got.dtype == z.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "make", [optim.adam_8bit, *(CASES[name].make for name in ("galore", "lisa", "trion"))]
)
def test_others_refuse_complex_numbers(make):
    params = {"layers": {"kernel": jnp.ones((4, 4, 6), jnp.complex64)}}
    with pytest.raises(ValueError, match=r"params: got complex64\[4, 4, 6\] at layers/kernel"):
        make(0.1).init(params)


@pytest.mark.parametrize("name", ["lion", "lion_8bit", "adamw_8bit"])
def test_decay_of_bfloat16_params(name):
    """A part of 1e-3 of float32 gradients arrives on average; bfloat16 would lose it, and is refused."""
    w = jnp.full((64, 64), 0.3, jnp.bfloat16)
    opt = getattr(optim, name)(1.0, weight_decay=1e-3)
    signs = jnp.asarray(np.random.default_rng(0).choice([-1, 1], w.shape), jnp.float32)
    first = jax.jit(lambda g, w: opt.update(g, opt.init(w), w)[0])
    updates = first(signs, w)

    @jax.jit
    def moved(keys):
        one = lambda key: optim.apply_updates_stochastic(w, updates, key).astype(jnp.float32) - w + signs  # noqa: E731
        return -jnp.mean(jax.vmap(one)(keys))

    decay = float(moved(jax.random.split(jax.random.key(1), 100)))
    assert_close(updates, -np.asarray(signs) - 3e-4, "bfloat16")
    assert abs(decay - 3e-4) < 5e-5  # five standard errors: a number is rounded to 1/256
    narrow = jax.eval_shape(first, signs.astype(jnp.bfloat16), w)
    with pytest.raises(ValueError, match=r"updates: got bfloat16\[64, 64\].*expected float32"):
        jax.eval_shape(optim.apply_updates_stochastic, w, narrow, jax.random.key(0))
