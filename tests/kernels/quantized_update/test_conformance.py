"""Every backend of quantized_update against float64 numpy: rules, formats, shapes, dtypes, short groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from tests.cases import served

from .definition import check_step

HYPER = {
    "adam": (0.9, 0.999, 1e-8, 1 / (1 - 0.9**3), 1 / (1 - 0.999**3)),
    "lion": (0.9, 0.99),
    "momentum": (0.9,),
    "nesterov": (0.9,),
}
CASES = [  # rule, shape, group size, formats, dtype
    ("adam", (7, 512), 256, ("dynamic8", "udynamic8"), "float32"),
    ("adam", (2, 37, 384), 128, ("mulaw8", "ufp8_e4m4"), "bfloat16"),
    ("adam", (5, 2, 300), 128, ("mulaw8", "ufp8_e4m4"), "float32"),  # the last group has 44
    ("adam", (1000,), 256, ("dynamic8", "udynamic8"), "float32"),
    ("lion", (9, 60), 60, ("dynamic8",), "float32"),
    ("momentum", (70, 256), 128, ("int8",), "float32"),
    ("nesterov", (3, 256), 256, ("mulaw8",), "float32"),
]
WHOLE = [case for case in CASES if case[1][-1] % 128 == 0]
# A GPU's kernel is interpreted slowly: few groups, but more than one block of them, with a rest.
ON_GPU = [
    ("adam", (67, 128), 128, ("dynamic8", "udynamic8"), "float32"),
    ("adam", (3, 512), 256, ("mulaw8", "ufp8_e4m4"), "bfloat16"),
    ("lion", (1024,), 512, ("int8",), "float32"),
]
SERVED = {"reference": CASES, "xla": CASES, "pallas_tpu": WHOLE, "pallas_gpu": ON_GPU}


def arguments(rule, shape, group_size, formats, dtype):
    """A gradient whose rows differ in size, and moments that have seen others; one group is zero."""
    rng = np.random.default_rng(0)
    rows = 10 ** rng.uniform(-4, 0, (*shape[:-1], 1))
    g = (rows * rng.standard_normal(shape)).astype(jnp.dtype(dtype))
    moments = []
    for i, name in enumerate(formats):
        x = rows * rng.standard_normal(shape) if i == 0 else (rows * rng.standard_normal(shape)) ** 2
        x[..., :group_size] *= len(shape) > 1
        moments.append(
            frugax.formats.quantize(jnp.asarray(x, jnp.float32), name, axis=-1, group_size=group_size)
        )
    return jnp.asarray(g), tuple(moments)


def traits(case) -> set:
    rule, shape, size, formats, dtype = case
    return {rule, dtype, *formats, f"{len(shape)} axes", "rest" if shape[-1] % size else "whole"}


@pytest.mark.parametrize(
    ("backend", "case"), served(SERVED, has=traits, ids=lambda c: f"{c[0]}-{c[1]}-{c[4]}")
)
def test_a_step(backend, case):
    rule = case[0]
    g, moments = arguments(*case)
    update, new = jax.jit(
        lambda g, m: frugax.kernels.quantized_update(rule, g, m, HYPER[rule], backend=backend)
    )(g, moments)
    assert update.dtype == g.dtype
    check_step(rule, g, moments, new, update, HYPER[rule], name=f"{backend} {case}")


def test_chunks_and_their_rest_in_place():
    """More rows than one chunk, with some left over; temporaries are a chunk's, not a leaf's."""
    from frugax.kernels.quantized_update.tiling import CHUNK

    for shape, group_size in (((2 * CHUNK // 256 + 5, 256), 256), ((CHUNK // 700 + 3, 700), 256)):
        case = ("adam", shape, group_size, ("dynamic8", "udynamic8"), "float32")
        g, moments = arguments(*case)
        f = jax.jit(
            lambda g, m: frugax.kernels.quantized_update("adam", g, m, HYPER["adam"]), donate_argnums=(0, 1)
        )
        compiled = f.lower(g, moments).compile()
        update, new = compiled(g + 0, jax.tree.map(lambda x: x + 0, moments))
        check_step("adam", g, moments, new, update, HYPER["adam"], name=str(shape))


def test_temporaries_do_not_grow_with_the_leaf():
    """A leaf of 64 MB needs six float32 copies of a chunk at most, besides what is updated in place.

    And leaves of any size need less than the six bytes a number that 8 bits save.
    """
    from frugax.kernels.quantized_update.tiling import CHUNK

    def temporaries(rows, columns=4096):
        g = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        moments = jax.eval_shape(
            lambda g: tuple(
                frugax.formats.quantize(g, n, axis=-1, group_size=256) for n in ("dynamic8", "udynamic8")
            ),
            g,
        )
        f = jax.jit(
            lambda g, m: frugax.kernels.quantized_update("adam", g, m, HYPER["adam"]), donate_argnums=(0, 1)
        )
        return f.lower(g, moments).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 6 * 4 * CHUNK
    assert abs(temporaries(4096) - temporaries(1024)) < 2**17
    for rows, columns in ((64, 1024), (1000, 640), (512, 4096)):
        assert temporaries(rows, columns) < 6 * rows * columns


@pytest.mark.parametrize("formats", [("dynamic8", "udynamic8"), ("mulaw8", "ufp8_e4m4")])
@pytest.mark.parametrize("backend", ["xla", "pallas_tpu", "pallas_gpu"])
def test_numbers_below_the_normal_ones(backend, formats):
    """Second moments of 1e-43, one over which is no float32, become zero or stay; nothing is inf or NaN."""
    g = jnp.full((3, 256), 1e-20).at[0].set(1.0)
    moments = tuple(
        frugax.formats.quantize(jnp.zeros((3, 256)), name, axis=-1, group_size=128) for name in formats
    )
    update, (m, v) = frugax.kernels.quantized_update("adam", g, moments, HYPER["adam"], backend=backend)
    assert np.isfinite(update).all()
    np.testing.assert_allclose(m.dequantize(), 0.1 * g, rtol=1e-5)
    np.testing.assert_allclose(v.dequantize(), 0.001 * g * g, rtol=1e-5, atol=1e-38)


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
    g, moments = arguments(*CASES[0])
    for arguments_, says in [
        (("adan", g, moments, HYPER["adam"]), "rule: got 'adan'"),
        (("adam", g[0, 0], moments, HYPER["adam"]), "grad: got"),
        (("adam", g, moments[:1], HYPER["adam"]), "moments: got 1; expected 2"),
        (("adam", g, moments, (0.9,)), "hyper: got 1 numbers; expected b1, b2"),
        (("adam", g[:2], moments, HYPER["adam"]), "moments.0.: got dynamic8"),
    ]:
        with pytest.raises(ValueError, match=says):
            frugax.kernels.quantized_update(*arguments_)
    short, moments = arguments(*CASES[2])
    with pytest.raises(ValueError, match="128 does not divide"):
        frugax.kernels.quantized_update("adam", short, moments, HYPER["adam"], backend="pallas_tpu")
