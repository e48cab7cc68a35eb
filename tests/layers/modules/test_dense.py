"""Dense and QuantizedDense: flax's layer on the weights that the codes stand for; a decoder's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from frugax.formats import QuantizedTensor, quantize
from frugax.layers import MLGRU, Bidirectional, Block, Decoder, Dense, QuantizedDense
from tests.errors import assert_close

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 20)), jnp.float32)


def is_packed(x):
    return isinstance(x, QuantizedTensor)


def dequantized(tree):
    return jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, tree, is_leaf=is_packed)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dense_is_that_of_flax(dtype):
    """The same params give the same bits; and the same are born from the same key."""
    ours, theirs = Dense(7, dtype=dtype), nn.Dense(7, dtype=dtype)
    variables = ours.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), X))
    np.testing.assert_array_equal(ours.apply(variables, X), theirs.apply(variables, X))


@pytest.mark.parametrize("use_bias", [True, False])
def test_quantized_dense_is_a_dense_layer_of_its_weights(use_bias):
    layer = QuantizedDense(7, "int4", group_size=8, use_bias=use_bias)
    _, variables = jax.jit(layer.init_with_output)(jax.random.key(0), X)
    kernel = variables["params"]["kernel"]
    born = nn.Dense(7, use_bias=use_bias).init(jax.random.key(0), X)["params"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, kernel, quantize(born, "int4", group_size=8))
    if use_bias:
        variables["params"]["bias"] = jnp.arange(7.0)
    arrays = dequantized(variables)
    assert_close(layer.apply(variables, X), nn.Dense(7, use_bias=use_bias).apply(arrays, X), "float32")
    assert_close(Dense(7, use_bias=use_bias).apply(variables, X), layer.apply(variables, X), "float32")
    half = layer.clone(dtype=jnp.bfloat16).apply(variables, X)
    assert half.dtype == jnp.bfloat16
    assert_close(half, layer.apply(variables, X), "bfloat16")


def test_a_kernel_of_another_format_is_refused():
    layer = QuantizedDense(7, "int4")
    for kernel, message in [
        (quantize(jnp.ones((20, 7)), "int8"), "kernel: got int8; expected int4"),
        (jnp.ones((20, 7), jnp.float32), "kernel: got float32.*; expected int4"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer.apply({"params": {"kernel": kernel, "bias": jnp.ones(7)}}, X)


@pytest.mark.nan
@pytest.mark.parametrize(
    "format", ["nvfp4", *(pytest.param(f, marks=pytest.mark.full) for f in ("int4", "uint3"))]
)
def test_tables_of_a_decoder_in_few_bits(format):
    """Rows are decoded by token, and a head multiplies without being decoded whole; no id, no number."""
    V, D = 11, 40
    model = Decoder(V, D, (Block("GatedConvolution", None),), tie_embeddings=False, backend="xla")
    tokens = jnp.array([[3, 10, 0], [7, V, 2]])
    params = dict(jax.jit(model.init)(jax.random.key(0), tokens)["params"])
    params |= {name: quantize(params[name], format, axis=-1) for name in ("embedding", "head")}
    got, want = (jax.jit(model.apply)({"params": p}, tokens)[0] for p in (params, dequantized(params)))
    assert jnp.isnan(got[1, 1:]).all()
    assert_close((got[0], got[1, :1]), (want[0], want[1, :1]), "float32")
    narrow, _ = model.clone(dtype=jnp.bfloat16).apply({"params": params}, tokens[:1])
    assert narrow.dtype == jnp.float32
    # Six roundings in a row, from the embedding to the last norm, half a unit each at most: squares add up.
    assert_close(narrow, got[:1], "bfloat16", times=2)


def test_both_directions_share_a_packed_matrix():
    layer = Bidirectional(MLGRU(backend="xla"))
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    pack = lambda path, x: quantize(x, "int5", axis=-2) if path[-1].key == "kernel" else x  # noqa: E731
    packed = jax.tree_util.tree_map_with_path(pack, variables)
    got, want = (jax.jit(layer.apply)(v, X) for v in (packed, dequantized(packed)))
    assert_close(got, want, "float32")
