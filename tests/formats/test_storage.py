"""Packed tensors over devices and in checkpoints, and how many bytes the compiler counts."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import frugax
from frugax.formats import quantize
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
