"""Mixers whose matrices are packed: the outputs of the dequantized weights."""

import jax
import jax.numpy as jnp
import pytest

from frugax.formats import QuantizedTensor, quantize
from frugax.optim.common.matrix_spec import leaf_path
from tests.errors import assert_close

from .mixers import MIXERS, VARIANTS, calls, make, together

# Of more than one axis, and no matrices that multiply the input: gains by head, mixes, rates, convolutions.
NO_MATRICES = {"weight", "mu", "bonus", "bias", "A_log", "theta"}
# A mixer of dense layers and of matrices of its own, and one of ternary codes; by default others are traced.
RUN = {"LinearAttention-learned", "MLGRU-ternary"}
# Those with the same matrices as another.
SAME = VARIANTS | {"LightningAttention-lrpe", "GatedLinearAttention", "LinearAttention-elu+1"}


def is_matrix(path, leaf):
    return leaf.ndim >= 2 and leaf_path(path).rpartition("/")[2] not in NO_MATRICES


def packed(variables, format, **options):
    def pack(path, leaf):
        return quantize(leaf, format, axis=-2, **options) if is_matrix(path, leaf) else leaf

    return jax.tree_util.tree_map_with_path(pack, variables)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in SAME | RUN else []) for name in MIXERS]
)
def test_every_matrix_may_be_packed(name):
    module, variables, x = make(name, time=3, dtype=jnp.float32)
    shapes = jax.eval_shape(lambda v: packed(v, "int3", group_size=2), variables)
    y, state = jax.eval_shape(module.apply, shapes, x)
    assert (y, state) == jax.eval_shape(module.apply, variables, x)


@together(full=set(MIXERS) - RUN)
def test_packed_is_dequantized(name):
    ternary = name.endswith("-ternary")
    with jax.enable_x64(True):
        mine = calls(name)
        module, x = make(name)[0], mine.now
        variables = packed(mine.variables, "ternary" if ternary else "int5")
        y, state = jax.jit(module.apply)(variables, x)
        is_packed = lambda w: isinstance(w, QuantizedTensor)  # noqa: E731
        read = lambda w: w.dequantize(x.dtype) if is_packed(w) else w  # noqa: E731
        arrays = mine.variables if ternary else jax.tree.map(read, variables, is_leaf=is_packed)
        want, _ = mine._whole(arrays, x, mine.nothing_read, mine.ids, mine.cotangents())
        # Packed, codes are summed before they are scaled; a dequantized weight is rounded to float32.
        assert_close((y, state), want, "float32")
