"""The study of minifloats in a vision transformer: folds change nothing, every method gives legal values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import examples
from experiments.studies import minifloat_digits as study
from frugax import quant
from tests.errors import assert_close


@pytest.fixture(scope="module")
def model():
    """Params of which some channels are far larger than others, images, and statistics."""
    images = jnp.asarray(examples.digits().held_out.inputs[:40])
    params = jax.jit(study.ViT().init)(jax.random.key(0), images)["params"]
    layers = params["layers"]
    layers["up"]["kernel"] = layers["up"]["kernel"].at[:, :, 5].multiply(20.0)
    layers["mixer_norm"]["scale"] = layers["mixer_norm"]["scale"].at[:, 3].set(9.0)
    return params, images, study.calibrated(params, images)


def test_scales_between_matrices_leave_the_function_as_it_was(model):
    params, images, statistics = model
    assert set(statistics) == {name for names in study.SHARED for name in names}
    want = study.logits_of(params, images, None)
    layers, after = study.folded(params["layers"], statistics, study.equalised)
    ranges = [np.abs(layers["up"]["kernel"]).max(1), np.abs(layers["down"]["kernel"]).max(2)]
    np.testing.assert_allclose(*ranges, rtol=1e-5)
    assert_close(study.logits_of(params | {"layers": layers}, images, None), want, "float32", times=4)
    again = study.calibrated(params | {"layers": layers}, images)
    assert_close(after["down"].gram, again["down"].gram, "float32", times=4)


@pytest.mark.full
@pytest.mark.parametrize("base", study.BASES)
def test_every_method_gives_values_of_the_format(model, base):
    """At most 15 values a column, and a logit error below that of rounding to the nearest."""
    params, images, statistics = model
    exact, format = study.logits_of(params, images, None), study.FORMATS["fp4_e2m1"]
    error = lambda params: jnp.mean((study.logits_of(params, images, None) - exact) ** 2)  # noqa: E731
    plain = error(study.quantized(params, statistics, format, "nearest", "alone"))
    for addition in study.ADDITIONS:
        few = study.quantized(params, statistics, format, base, addition)
        for name in statistics:
            column = np.asarray(few["layers"][name]["kernel"])[0, :, 0]
            assert len(np.unique(column)) <= 15
        if (base, addition) != ("nearest", "alone"):
            assert error(few) < 1.05 * plain, addition


def test_learned_rounding_follows_both(model):
    """With AWQ's scales and from GPTQ's codes the outputs are nearer than without."""
    params, _, statistics = model
    w, inputs = params["layers"]["up"]["kernel"], statistics["up"]
    format = study.FORMATS["fp3_e2m0"]
    s = quant.awq_scale(w, inputs, format)
    gptq = quant.gptq(w, inputs, format)
    scaled = quant.multiply_inputs(w, s)
    found = {
        "gptq": gptq.dequantize(),
        "gptq, learned": quant.learned_rounding(w, inputs, format, start=gptq, steps=100).dequantize(),
        "awq": quant.awq(w, inputs, format, clip=False).weights.dequantize() / s[..., None],
        "awq, learned": quant.learned_rounding(scaled, inputs.divided(s), format, steps=100).dequantize()
        / s[..., None],
    }
    errors = {name: float(quant.output_error(w, q, inputs).sum()) for name, q in found.items()}
    assert errors["gptq, learned"] < errors["gptq"]
    assert errors["awq, learned"] < 0.95 * errors["awq"]


@pytest.mark.full
def test_the_whole_study(capsys):
    study.main(["--smoke"])
    assert "learned" in capsys.readouterr().out
