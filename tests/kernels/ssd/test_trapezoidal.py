"""Mamba-3's recurrence against the paper's equation, one token at a time in float64 numpy."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import frugax
from tests.errors import assert_close

b, t, h, g, n, p = 2, 70, 4, 2, 3, 5
ROWS = ("x", "dt", "A", "B", "C", "mix")


def arguments(length=t, dtype=np.float32):
    rng = np.random.default_rng(length)
    a = {
        "x": rng.standard_normal((b, length, h, p)),
        "dt": rng.uniform(0.01, 1, (b, length, h)),
        "A": -rng.uniform(0.1, 2, (b, length, h)),
        "B": rng.standard_normal((b, length, g, n)),
        "C": rng.standard_normal((b, length, g, n)),
        "mix": rng.uniform(0, 1, (b, length, h)),
        "D": rng.standard_normal(h),
    }
    state = (
        rng.standard_normal((b, h, n, p)),
        rng.standard_normal((b, g, n)),
        rng.standard_normal((b, h, p)),
    )
    ids = np.cumsum(rng.random((b, length)) < 4 / length, axis=1).astype(np.int32) % 3
    return {k: v.astype(dtype) for k, v in a.items()}, tuple(s.astype(dtype) for s in state), ids


def equation(x, dt, A, B, C, mix, D, state, segment_ids):
    memory, B_before, x_before = (s.copy() for s in state)
    out = []
    for i in range(x.shape[1]):
        if i > 0:
            new = segment_ids[:, i] != segment_ids[:, i - 1]
            memory[new], B_before[new] = 0, 0
        a = np.exp(dt[:, i] * A[:, i])[..., None, None]
        w = (mix[:, i] * dt[:, i])[..., None, None]
        late = ((1 - mix[:, i]) * dt[:, i])[..., None, None] * a
        kv, kv_before = (
            np.repeat(B_, h // g, axis=1)[..., None] * x_[:, :, None]
            for B_, x_ in ((B[:, i], x[:, i]), (B_before, x_before))
        )
        memory = a * memory + late * kv_before + w * kv
        B_before, x_before = B[:, i].copy(), x[:, i]
        read = np.einsum("bhn,bhnp->bhp", np.repeat(C[:, i], h // g, axis=1), memory)
        out.append(read + D[:, None] * x[:, i])
    return np.stack(out, axis=1), (memory, B_before, x_before)


def call(a, state=None, ids=None):
    a = {k: jnp.asarray(v) for k, v in a.items()}
    state = None if state is None else frugax.kernels.TrapezoidalState(*map(jnp.asarray, state))
    ids = None if ids is None else jnp.asarray(ids)
    run = jax.jit(lambda a, s, i: frugax.kernels.trapezoidal_ssd(**a, initial_state=s, segment_ids=i))
    y, state = run(a, state, ids)
    return y, tuple(state)


@pytest.mark.parametrize("length", [1, t])
def test_values(length):
    a, state, ids = arguments(length)
    wide = {k: v.astype(np.float64) for k, v in a.items()}
    want = equation(**wide, state=tuple(s.astype(np.float64) for s in state), segment_ids=ids)
    assert_close(call(a, state, ids), want, "float32")


def test_gradients_are_finite_differences():
    def dot(dot_of_two, weights, out):
        return sum(map(dot_of_two, jax.tree.leaves(weights), jax.tree.leaves(out)))

    with jax.enable_x64(True):
        a, state, ids = arguments(9, np.float64)
        rng = np.random.default_rng(1)
        weights, ways = (
            jax.tree.map(lambda x: rng.standard_normal(x.shape), tree)
            for tree in (call(a, state, ids), (a, state))
        )
        grads = jax.grad(lambda a, state: dot(jnp.vdot, weights, call(a, state, ids)), (0, 1))(a, state)

        def along(step):
            a_, state_ = jax.tree.map(lambda x, way: x + step * way, (a, state), ways)
            return dot(np.vdot, weights, equation(**a_, state=state_, segment_ids=ids))

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        assert dot(np.vdot, grads, ways) == pytest.approx(
            slope, rel=1e-6
        )  # step^2, and rounding over the step


def test_chunks_that_carry_the_state_are_one_call():
    a, state, ids = arguments()
    first = {k: v[:, :37] if k in ROWS else v for k, v in a.items()}
    second = {k: v[:, 37:] if k in ROWS else v for k, v in a.items()}
    ids[:, 36:38] = 1  # the cut is inside a document
    y1, middle = call(first, state, ids[:, :37])
    y2, last = call(second, middle, ids[:, 37:])
    assert_close((jnp.concatenate([y1, y2], axis=1), last), call(a, state, ids), "float32")


def test_a_share_of_one_is_mamba_2():
    a, _, ids = arguments()
    rates = -np.linspace(0.2, 1, h).astype(np.float32)
    a |= {"mix": np.ones_like(a["mix"]), "A": np.broadcast_to(rates, a["A"].shape)}
    x, dt, B, C, D = (jnp.asarray(a[k]) for k in ("x", "dt", "B", "C", "D"))
    want, _ = frugax.kernels.ssd(x, dt, jnp.asarray(rates), B, C, D, segment_ids=jnp.asarray(ids))
    assert_close(call(a, None, ids)[0], want, "float32")


@pytest.mark.parametrize(
    ("name", "shape"), [("mix", (2, 6)), ("A", (4,)), ("dt", (2, 6, 3)), ("C", (2, 6, 2, 4))]
)
def test_names_the_argument(name, shape, unchecked_types):
    a, _, _ = arguments(6)
    with pytest.raises(ValueError, match=f"{name}: got"):
        call(a | {name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("A", 0.1, "A: a value is positive"), ("dt", -0.1, "dt: a value is negative"), ("mix", 0.5, None)],
)
def test_wrong_signs_are_caught_under_checkify(name, value, message):
    a, _, _ = arguments(6)
    a[name][1, 2, 3] = value
    error, _ = checkify.checkify(lambda: call(a), errors=checkify.user_checks)()
    assert (error.get() is None) if message is None else (message in error.get())


def test_example():
    assert doctest.testmod(importlib.import_module("frugax.kernels.trapezoidal_ssd")).failed == 0
