"""Calls that can't be right say which argument, and what is expected."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

import frugax

pytestmark = pytest.mark.usefixtures("unchecked_types")

B, T, D, N = 2, 6, 4, 3
X, ROWS = jnp.ones((B, T, D)), jnp.ones((B, T, N))
GOOD = {"x": X, "dt": X, "A": -jnp.ones((D, N)), "B": ROWS, "C": ROWS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X[0]}, r"x: got float32\[6, 4\]; expected \[batch, time, D\]"),
        ({"x": X[:, :0], "dt": X[:, :0]}, r"x: got float32\[2, 0, 4\]; expected every size >= 1"),
        ({"x": X.astype(int)}, r"x: got int32\[2, 6, 4\]; expected a floating dtype"),
        ({"dt": X[:, :5]}, r"dt: got float32\[2, 5, 4\]; expected \[2, 6, 4\]"),
        ({"dt": X.astype(jnp.complex64)}, r"dt: got complex64.* expected a floating dtype"),
        ({"A": -jnp.ones((N, D))}, r"A: got float32\[3, 4\]; expected \[4, N\] \(x's D\)"),
        ({"A": -jnp.ones(D)}, r"A: got float32\[4\]; expected \[4, N\] \(x's D\)"),
        ({"A": -jnp.ones((D, 0))}, r"A: got float32\[4, 0\]; expected every size >= 1"),
        ({"B": jnp.ones((B, T, N + 1))}, r"B: got float32\[2, 6, 4\]; expected \[2, 6, 3\]"),
        ({"C": ROWS.astype(int)}, r"C: got int32\[2, 6, 3\]; expected a floating dtype"),
        ({"D": jnp.ones((D, 1))}, r"D: got float32\[4, 1\]; expected \[4\]"),
        ({"z": X[..., :3]}, r"z: got float32\[2, 6, 3\]; expected \[2, 6, 4\]"),
        ({"dt_bias": jnp.ones(N)}, r"dt_bias: got float32\[3\]; expected \[4\]"),
        (
            {"initial_state": jnp.ones((B, N, D))},
            r"initial_state: got float32\[2, 3, 4\]; expected \[2, 4, 3\]",
        ),
        ({"segment_ids": jnp.ones((B, T))}, r"segment_ids: got float32\[2, 6\]; expected integers \[2, 6\]"),
    ],
)
def test_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda call: frugax.kernels.selective_scan(**call))({**GOOD, **change})


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend: got 'cuda'; expected 'reference', 'xla'"):
        frugax.kernels.selective_scan(**GOOD, backend="cuda")


@pytest.mark.parametrize(("backend", "most"), [("pallas_tpu", 128), ("pallas_gpu", 16)])
def test_a_kernel_that_cannot_serve_says_why(backend, most):
    half = {name: x.astype(jnp.float16) for name, x in GOOD.items()}
    with pytest.raises(ValueError, match=f"backend='{backend}' can't serve this call: .* not float16"):
        frugax.kernels.selective_scan(**half, backend=backend)
    wide = jax.ShapeDtypeStruct((B, T, most + 1), jnp.float32)
    rates = jax.ShapeDtypeStruct((D, most + 1), jnp.float32)
    text = frugax.kernels.explain("selective_scan", X, X, rates, wide, wide)
    assert f"not {backend}: N={most + 1}: at most {most} states" in text


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {}, None),
        ({"A": GOOD["A"].at[1, 2].set(0.1)}, {}, "A: a value is positive"),
        ({"dt": X.at[1, 2, 3].set(-0.1)}, {}, "dt: a value is negative"),
        ({"dt": X.at[1, 2, 3].set(-0.1)}, {"dt_softplus": True}, None),
        ({"dt_bias": -2.0 * jnp.ones(D)}, {}, "dt: a value is negative"),
    ],
)
def test_signs_are_caught_under_checkify(change, options, message):
    call = jax.jit(lambda arrays: frugax.kernels.selective_scan(**arrays, **options))
    error, _ = checkify.checkify(call, errors=checkify.user_checks)({**GOOD, **change})
    if message is None:
        error.throw()
    else:
        with pytest.raises(checkify.JaxRuntimeError, match=message):
            error.throw()
