"""Packed tensors over devices and in checkpoints, and how many bytes the compiler counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import frugax
from frugax.formats import format_named, quantize
from frugax.formats.codebook import NF4
from tests.devices import run_on_eight_devices
from tests.errors import assert_close


def test_packed_params_keep_their_sharding():
    run_on_eight_devices("tests.formats.sharded")


@pytest.mark.parametrize("name", ["int3", "bitmod4"])
def test_bytes_are_those_that_the_compiler_counts(name):
    """The result of a program that packs is `nbytes` large; so is the argument of one that unpacks."""
    w = jax.ShapeDtypeStruct((384, 40), jnp.float32)
    pack = lambda w: quantize(w, name, group_size=64)  # noqa: E731
    q = jax.eval_shape(pack, w)
    made = jax.jit(pack).lower(w).compile().memory_analysis()
    pointers = 8 * len(jax.tree.leaves(q))
    assert made.output_size_in_bytes - q.nbytes in (0, pointers)
    taken = jax.jit(lambda q: q.dequantize()).lower(q).compile().memory_analysis()
    assert taken.argument_size_in_bytes == q.nbytes


def test_products_with_formats_that_no_kernel_knows():
    """`quantized_matmul` decodes groups with codebooks or ends of their own, and pairs, by the format."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 320), (320, 6)))

    @jax.jit
    def run(x, w):
        found = {}
        for name in ("bitmod3", "olive4", "ternary_minmax"):
            q = quantize(w, name, group_size=64)
            found[name] = frugax.kernels.quantized_matmul(x, q), x @ q.dequantize()
        return found

    for name, (got, want) in run(x, w).items():
        assert_close(got, want, "float32", name=name)


def test_values_in_float64_are_those_of_products():
    """A value times its scale, rounded once: the rows that a product in float64 with the unit matrix has."""
    w = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    with jax.enable_x64(True):

        @jax.jit
        def run(w):
            q = quantize(w, "nf4", group_size=16)
            plain = q.unpacked(), jnp.repeat(q.scales, 16, 0)[:40]
            return q.dequantize(jnp.float64), frugax.kernels.quantized_matmul(jnp.eye(40), q), *plain

        got, rows, codes, scales = run(w)
    want = np.asarray(NF4, np.float32).astype(np.float64)[np.asarray(codes).T] * np.float64(scales)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("int4", "int3", r"int3 for codes uint8\[16, 4\]; expected a multiple of 3 bytes along axis -2"),
        ("int4", "int2", r"int2 for scales float32\[1, 4\]; expected 2 along axis -2 for groups of 32"),
        ("int4", "int8", r"int8 for codes uint8\[16, 4\]; expected int8"),
        ("int4", "uint4", "uint4 without zeros; expected them"),
        ("uint4", "int4", "int4 with zeros; expected none"),
        ("nf4", "mxfp4", r"mxfp4 for scales float32\[1, 4\]; expected uint8"),
        ("nf4", "nf4_dq", "nf4_dq for scales of .*; expected those of TwoLevel"),
        ("nvfp4", "bitmod4", "bitmod4 for scales of CodedScales"),
    ],
)
def test_arrays_that_can_not_be_of_the_format_are_refused(name, other, says):
    q = jax.eval_shape(lambda x: quantize(x, name), jax.ShapeDtypeStruct((32, 4), jnp.float32))
    q = dataclasses.replace(q, format=format_named(other))
    q = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), q)
    for use in (q.dequantize, lambda: frugax.kernels.quantized_matmul(jnp.ones((1, 32)), q)):
        with pytest.raises(ValueError, match=f"format: got {says}"):
            use()


def test_checkpoints(tmp_path):
    """A tree of params, packed and not, through Orbax as the trainer uses it; formats are its structure."""
    w = np.random.default_rng(0).standard_normal((2, 70, 8)).astype(np.float32)
    names = ("int3", "nf4_dq", "bitmod3", "olive4")
    pack = lambda w: {n: quantize(w, n, axis=-2, group_size=32) for n in names}  # noqa: E731
    params = jax.jit(pack)(w) | {"bias": jnp.ones(3)}
    manager = ocp.CheckpointManager(tmp_path)
    manager.save(1, args=ocp.args.StandardSave(params))
    manager.wait_until_finished()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    back = manager.restore(1, args=ocp.args.StandardRestore(like))
    manager.close()
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
