"""Calls that can't be right say which argument, and what is expected."""

import jax
import jax.numpy as jnp
import pytest

import frugax

pytestmark = pytest.mark.usefixtures("unchecked_types")

B, T, D = 2, 6, 4
GOOD = {"a": jnp.ones((B, T, D)), "b": jnp.ones((B, T, D))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": jnp.ones((B, T))}, r"a: got float32\[2, 6\]; expected \[batch, time, D\]"),
        ({"b": jnp.ones((B, T, D + 1))}, r"b: got float32\[2, 6, 5\]; expected a's shape \[2, 6, 4\]"),
        ({"b": jnp.ones((B, T, D), jnp.int32)}, r"b: got int32.* expected a floating dtype"),
        ({"a": jnp.ones((B, T, D), jnp.complex64)}, r"a: got complex64.* expected a floating dtype"),
        ({"a": jnp.ones((B, 0, D)), "b": jnp.ones((B, 0, D))}, r"a: got .* expected every size >= 1"),
        ({"initial_state": jnp.ones((B, T, D))}, r"initial_state: got .* expected \[2, 4\]"),
        (
            {"initial_state": jnp.ones((B, D), jnp.int32)},
            r"initial_state: got int32.* expected a floating dtype",
        ),
        ({"segment_ids": jnp.ones((B, T))}, r"segment_ids: got float32\[2, 6\]; expected integers \[2, 6\]"),
        ({"segment_ids": jnp.ones((B, T + 1), jnp.int32)}, r"segment_ids: got"),
    ],
)
def test_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda call: frugax.kernels.linear_recurrence(**call))({**GOOD, **change})


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend: got 'cuda'; expected 'reference', 'xla'"):
        frugax.kernels.linear_recurrence(**GOOD, backend="cuda")


@pytest.mark.parametrize("backend", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_that_cannot_serve_says_why(backend):
    half = {name: x.astype(jnp.float16) for name, x in GOOD.items()}
    assert f"not {backend}: the" in frugax.kernels.explain("linear_recurrence", **half)
    with pytest.raises(ValueError, match=f"backend='{backend}' can't serve this call: .* not float16"):
        frugax.kernels.linear_recurrence(**half, backend=backend)
    h, _ = frugax.kernels.linear_recurrence(**half)  # None falls back to xla
    assert h.dtype == jnp.float16
    assert (h[0, :, 0] == jnp.arange(1, 7)).all()


def test_explain_names_the_kernels():
    text = frugax.kernels.explain("linear_recurrence", **GOOD, reverse=True)
    assert "cpu: xla" in text
    assert "tpu: pallas_tpu" in text
