"""Calls that can't be right say which argument, and what is expected."""

import jax
import jax.numpy as jnp
import pytest

import frugax

pytestmark = pytest.mark.usefixtures("unchecked_types")

B, T, H, D = 2, 6, 3, 4
GOOD = {"gates": jnp.ones((B, T, H, 4, D)), "recurrent": jnp.ones((H, 4, D, D))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"gates": jnp.ones((B, T, H, D))},
            r"gates: got float32\[2, 6, 3, 4\]; expected \[batch, time, heads, 4, D\]",
        ),
        ({"gates": jnp.ones((B, T, H, 3, D))}, r"gates: got .* \(of 4 gates: cell='lstm'\)"),
        ({"gates": jnp.ones((B, T, H, 4, D), jnp.int32)}, r"gates: got int32.* expected a floating dtype"),
        ({"gates": jnp.ones((B, 0, H, 4, D))}, r"gates: got .* expected every size >= 1"),
        ({"recurrent": jnp.ones((H, 4, D, D + 1))}, r"recurrent: got .* expected \[3, 4, 4, 4\]"),
        (
            {"recurrent": jnp.ones((H, 4, D, D), jnp.bfloat16)},
            r"recurrent: got bfloat16.* gates' dtype float32",
        ),
        ({"bias": jnp.ones((4, H, D))}, r"bias: got float32\[4, 3, 4\]; expected \[3, 4, 4\]"),
        ({"initial_state": jnp.ones((B, H, D))}, r"initial_state: got .* expected \[2, 2, 3, 4\] \(h, c\)"),
        (
            {"initial_state": jnp.ones((B, 2, H, D), jnp.int32)},
            r"initial_state: got int32.* a floating dtype",
        ),
        ({"segment_ids": jnp.ones((B, T))}, r"segment_ids: got float32\[2, 6\]; expected integers \[2, 6\]"),
    ],
)
def test_names_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda call: frugax.kernels.rnn(**call))({**GOOD, **change})


@pytest.mark.parametrize(
    ("backend", "size", "reason"),
    [
        (
            "pallas_tpu",
            4096,
            "heads of 4096 channels with 4 gates take at least .* bytes of VMEM, 50,331,648 are",
        ),
        ("pallas_gpu", 256, "heads of 256 channels with 4 gates take at least .* bytes of shared memory"),
    ],
)
def test_heads_too_large_for_a_chip(backend, size, reason):
    call = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 9, 1, 4, size), (1, 4, size, size))]
    text = frugax.kernels.explain("rnn", *call)
    platform = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}[backend]
    assert f"{platform}: xla" in text
    with pytest.raises(ValueError, match=f"backend='{backend}' can't serve this call: {reason}"):
        jax.eval_shape(lambda *call: frugax.kernels.rnn(*call, backend=backend), *call)


def test_dtypes_that_kernels_do_not_read():
    half = {name: x.astype(jnp.float16) for name, x in GOOD.items()}
    with pytest.raises(ValueError, match="the TPU kernel reads float32 and bfloat16, not float16"):
        frugax.kernels.rnn(**half, backend="pallas_tpu")
    with pytest.raises(ValueError, match="the GPU kernel's products are bfloat16's, not float32's"):
        frugax.kernels.rnn(**GOOD, backend="pallas_gpu")
    h, _ = frugax.kernels.rnn(**half)  # None falls back to xla
    assert h.dtype == jnp.float16
    text = frugax.kernels.explain("rnn", **GOOD)
    assert "tpu: pallas_tpu" in text
    assert "cuda: xla" in text


def test_unknown_names():
    with pytest.raises(ValueError, match=r"cell: got 'rnn'; expected one of 'lstm', 'gru', 'elman', 'slstm'"):
        frugax.kernels.rnn(**GOOD, cell="rnn")
    with pytest.raises(ValueError, match=r"backend: got 'cuda'; expected 'reference', 'xla'"):
        frugax.kernels.rnn(**GOOD, backend="cuda")
