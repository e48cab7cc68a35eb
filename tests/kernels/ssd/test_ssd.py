"""Mamba-2's recurrence against the paper's equation, one token at a time in float64 numpy."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import frugax
from tests.errors import assert_close

b, h, p, n = 2, 4, 5, 3
FLOATS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def arguments(t=70, g=2, *, D="h", fused=True, state=True, packed=True, dtype=np.float32):
    rng = np.random.default_rng(t + g)
    a = {
        "x": rng.standard_normal((b, t, h, p)),
        "dt": rng.standard_normal((b, t, h)) if fused else rng.uniform(0.01, 1, (b, t, h)),
        "A": -rng.uniform(0.1, 2, h),
        "B": rng.standard_normal((b, t, g, n)),
        "C": rng.standard_normal((b, t, g, n)),
    }
    if D:
        a["D"] = rng.standard_normal({"h": (h,), "hp": (h, p)}[D])
    if fused:
        a |= {"z": rng.standard_normal((b, t, h, p)), "dt_bias": rng.standard_normal(h), "dt_softplus": True}
    if state:
        a["initial_state"] = rng.standard_normal((b, h, n, p))
    if packed:
        a["segment_ids"] = np.cumsum(rng.random((b, t)) < 4 / t, axis=1).astype(np.int32) % 3
    return {k: v.astype(dtype) if k in FLOATS else v for k, v in a.items()}


def equation(
    x, dt, A, B, C, D=None, z=None, dt_bias=0, dt_softplus=False, initial_state=None, segment_ids=None
):
    dt = dt + dt_bias
    dt = np.log1p(np.exp(dt)) if dt_softplus else dt
    B, C = (np.repeat(m, x.shape[2] // m.shape[2], axis=2) for m in (B, C))
    state = np.zeros((b, h, n, p)) if initial_state is None else initial_state.copy()
    out = []
    for t in range(x.shape[1]):
        if segment_ids is not None and t > 0:
            state[segment_ids[:, t] != segment_ids[:, t - 1]] = 0
        state = np.exp(dt[:, t] * A)[..., None, None] * state
        state += dt[:, t, :, None, None] * B[:, t, :, :, None] * x[:, t, :, None, :]
        out.append(np.einsum("bhn,bhnp->bhp", C[:, t], state))
    y = np.stack(out, axis=1)
    if D is not None:
        y = y + (D[:, None] if D.ndim == 1 else D) * x
    return (y if z is None else y * z / (1 + np.exp(-z))), state


def call(a, **more):
    static = {k: v for k, v in {**a, **more}.items() if k in ("dt_softplus", "backend")}
    arrays = {k: jnp.asarray(v) for k, v in {**a, **more}.items() if k not in static}
    return jax.jit(lambda arrays: frugax.kernels.ssd(**arrays, **static))(arrays)


@pytest.mark.parametrize(
    "options",
    [
        {"g": 1, "D": None, "fused": False, "state": False, "packed": False},
        {"g": 2, "D": "h"},
        {"g": 4, "D": "hp", "t": 1, "packed": False},
    ],
    ids=["plain", "everything", "one-token"],
)
def test_values(options):
    a = arguments(**options)
    wide = {k: v.astype(np.float64) if k in FLOATS else v for k, v in a.items()}
    assert_close(call(a), equation(**wide), "float32")


def test_half_precision():
    a = arguments(fused=True)
    want = equation(**{k: v.astype(np.float64) if k in FLOATS else v for k, v in a.items()})
    half = {k: v.astype(jnp.bfloat16) if k in ("x", "B", "C", "z") else v for k, v in a.items()}
    y, state = call(half)
    assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    # Six roundings in a row: x, B, C, z, dt x, and what attention returns before D and z.
    assert_close((y, state), want, "bfloat16", times=6)


def test_gradients_are_finite_differences():
    with jax.enable_x64(True):
        a = arguments(t=9, dtype=np.float64)
        rng = np.random.default_rng(3)
        weights = rng.standard_normal((b, 9, h, p)), rng.standard_normal((b, h, n, p))
        fixed = {"segment_ids": jnp.asarray(a["segment_ids"]), "dt_softplus": True}

        def loss(floats):
            y, state = frugax.kernels.ssd(**floats, **fixed)
            return jnp.vdot(y, weights[0]) + jnp.vdot(state, weights[1])

        floats = {k: jnp.asarray(a[k]) for k in FLOATS}
        grads = jax.jit(jax.grad(loss))(floats)

        def along(name, way, step):
            y, state = equation(**{**a, name: a[name] + step * way})
            return np.vdot(y, weights[0]) + np.vdot(state, weights[1])

        for name in FLOATS:
            way, step = rng.standard_normal(a[name].shape), 1e-5
            slope = (along(name, way, step) - along(name, way, -step)) / (2 * step)
            # step^2 times a third derivative of order one, and rounding over the step.
            assert np.vdot(grads[name], way) == pytest.approx(slope, rel=1e-6), name


def test_chunks_that_carry_the_state_are_one_call():
    a = arguments(packed=False)
    cut = {k for k in ("x", "dt", "B", "C", "z")}
    first = {k: v[:, :37] if k in cut else v for k, v in a.items()}
    second = {k: v[:, 37:] if k in cut else v for k, v in a.items()}
    y1, state = call(first)
    y2, state = call(second, initial_state=state)
    assert_close((jnp.concatenate([y1, y2], axis=1), state), call(a), "float32")


@pytest.mark.parametrize("backend", ["reference", "pallas_tpu"])
def test_the_same_from_a_named_backend(backend):
    a = arguments(t=20, fused=False)
    assert_close(call(a, backend=backend), call(a), "float32")


GOOD = {
    "x": jnp.ones((2, 6, 4, 5)),
    "dt": jnp.ones((2, 6, 4)),
    "A": -jnp.ones(4),
    "B": jnp.ones((2, 6, 2, 3)),
    "C": jnp.ones((2, 6, 2, 3)),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 6, 20))}, r"x: got float32\[2, 6, 20\]; expected \[batch, time, heads, P\]"),
        ({"dt": jnp.ones((2, 6, 5))}, r"dt: got .* \[2, 6, 4\]"),
        ({"dt": jnp.ones((2, 6, 4), jnp.int32)}, r"dt: got int32.* expected a floating dtype"),
        ({"A": -jnp.ones((4, 3))}, r"A: got .* expected \[4\] \(x's heads\)"),
        ({"B": jnp.ones((2, 6, 3, 3)), "C": jnp.ones((2, 6, 3, 3))}, r"B: got .* groups that divide 4"),
        ({"C": jnp.ones((2, 6, 2, 4))}, r"C: got .* expected B's shape \[2, 6, 2, 3\]"),
        ({"D": jnp.ones(5)}, r"D: got .* expected \[4\] or \[4, 5\]"),
        ({"z": jnp.ones((2, 6, 4))}, r"z: got"),
        ({"dt_bias": jnp.ones(6)}, r"dt_bias: got .* expected \[4\]"),
        ({"initial_state": jnp.ones((2, 4, 5, 3))}, r"initial_state: got .* expected \[2, 4, 3, 5\]"),
        ({"segment_ids": jnp.ones((2, 6))}, r"segment_ids: got .* expected integers \[2, 6\]"),
    ],
)
def test_names_the_argument(change, message, unchecked_types):
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda a: frugax.kernels.ssd(**a))({**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": jnp.ones(4)}, "A: a value is positive"),
        ({"dt": -jnp.ones((2, 6, 4))}, "dt: a value is negative"),
    ],
)
def test_wrong_signs_are_caught_under_checkify(change, message):
    error, _ = checkify.checkify(frugax.kernels.ssd, errors=checkify.user_checks)(**{**GOOD, **change})
    with pytest.raises(ValueError, match=message):
        error.throw()
    frugax.kernels.ssd(**{**GOOD, **change})  # and cost nothing without it


def test_a_negative_dt_is_right_before_a_softplus():
    call = {**GOOD, "dt": -jnp.ones((2, 6, 4)), "dt_softplus": True}
    checkify.checkify(lambda: frugax.kernels.ssd(**call), errors=checkify.user_checks)()[0].throw()


def test_explain_says_what_linear_attention_would_run():
    text = frugax.kernels.explain("ssd", **GOOD)
    assert "cpu: xla" in text
    assert "tpu: pallas_tpu" in text


def test_example():
    assert doctest.testmod(importlib.import_module("frugax.kernels.ssd")).failed == 0
