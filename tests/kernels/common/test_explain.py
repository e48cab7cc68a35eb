"""`explain` serves every operation, those composed of others included."""

import jax
import jax.numpy as jnp
import pytest

import frugax


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def calls(T):
    """name -> positional arguments, for T tokens (a T x 1 image)."""
    x, steps, rows = array(2, T, 2, 64), array(2, T, 2), array(2, T, 1, 32)
    flat, narrow, gates = array(2, T, 128), array(2, T, 16), array(2, T, 1, 4, 64)
    four = [array(4, *y.shape) for y in (flat, narrow)]
    return {
        "linear_attention": (x, x, x, array(2, T, 2, dtype=jnp.float32)),
        "ssd": (x, steps, array(2), rows, rows),
        "trapezoidal_ssd": (x, steps, steps, rows, rows, steps),
        "selective_scan": (flat, flat, array(128, 16), narrow, narrow),
        "selective_scan_2d": (array(2, T, 1, 128), four[0], array(4, 128, 16), four[1], four[1]),
        "rnn": (gates, array(1, 4, 64, 64)),
    }


@pytest.mark.parametrize("op", calls(1))
def test_one_token_goes_to_xla_on_gpu(op):
    options = {"cell": "lstm"} if op == "rnn" else {}
    assert "cuda: pallas_gpu" in frugax.kernels.explain(op, *calls(64)[op], **options)
    assert "cuda: xla" in frugax.kernels.explain(op, *calls(1)[op], **options)
    named = frugax.kernels.explain(op, *calls(1)[op], **options, backend="pallas_gpu")
    assert "cuda: pallas_gpu" in named  # who names it gets it


@pytest.mark.parametrize(("T", "method"), [(1, "recurrent"), (1000, "chunks")])
def test_lmu_names_its_method(T, method):
    text = frugax.kernels.explain("lmu", array(1, T, 3), 4, 50.0)
    assert "cpu: xla (recurrent)" in text
    assert f"tpu: xla ({method})" in text


def test_rejects_what_is_no_operation():
    with pytest.raises(ValueError, match="expected an operation"):
        frugax.kernels.explain("linear_atention")


def test_compositions_check_their_arguments(unchecked_types):
    arguments = list(calls(64)["trapezoidal_ssd"])
    with pytest.raises(ValueError, match="mix"):
        frugax.kernels.explain("trapezoidal_ssd", *arguments[:5], array(2, 64, 3))
    arguments = list(calls(64)["selective_scan_2d"])
    with pytest.raises(ValueError, match="dt"):
        frugax.kernels.explain("selective_scan_2d", arguments[0], array(3, 2, 64, 128), *arguments[2:])
