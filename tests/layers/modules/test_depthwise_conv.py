"""Shifted products against XLA's grouped convolution."""

from functools import partial

import jax
import pytest
from flax import linen as nn

import frugax
from tests.errors import assert_close


@pytest.mark.parametrize(("shape", "use_bias", "dtype"), [
    ((2, 7, 5, 6), True, "float32"),
    ((1, 1, 4, 3), False, "float32"),
    ((2, 6, 5, 4), True, "bfloat16"),
])  # fmt: skip
def test_equals_a_grouped_convolution(shape, use_bias, dtype):
    """Values and gradients of x and of the params, which are the convolution's own, against float32."""
    x, dy = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (0, 1))
    ours = frugax.layers.DepthwiseConv(use_bias=use_bias)
    peer = nn.Conv(shape[-1], (3, 3), feature_group_count=shape[-1], use_bias=use_bias)
    shapes = jax.eval_shape(peer.init, jax.random.key(3), x)
    params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape, p.dtype), shapes)
    assert jax.eval_shape(ours.init, jax.random.key(3), x) == shapes

    @partial(jax.jit, static_argnums=0)
    def run(module, x, dy):
        y, vjp = jax.vjp(module.apply, params, x)
        return y, vjp(dy)

    got = run(ours, x, dy)
    assert got[0].dtype == x.dtype
    assert_close(got, run(peer, x.astype("float32"), dy.astype("float32")), dtype)
