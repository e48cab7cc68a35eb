"""QLoRA: adapters beside matrices in NF4 under doubly quantized scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from frugax.formats import QuantizedTensor, quantize
from frugax.layers import Block, Decoder
from frugax.peft import lora_apply, lora_init, lora_merge, lora_unmerge
from frugax.quant import quantize_params
from tests.errors import assert_close

V, RANK = 11, 3
TARGETS = {None: ("fcg", "out"), "GLU": ("fcg", "gate_in", "out")}
TOKENS = jnp.tile(jnp.array([[1, 5, 2, 8, 3]]), (2, 2))


@functools.cache
def make(width, repeats, channel):
    """(a decoder, its shapes with every kernel in 4 bits, the adapters' shapes)."""
    model = Decoder(V, width, (Block("MLGRU", channel),), repeats, remat=True, backend="xla")

    def init():
        params = model.init(jax.random.key(0), TOKENS)["params"]
        pack = lambda path, x: quantize(x, "nf4_dq", axis=-2) if "kernel" in str(path[-1]) else x  # noqa: E731
        packed = jax.tree_util.tree_map_with_path(pack, params)
        return packed, lora_init(jax.random.key(1), packed, targets=TARGETS[channel], rank=RANK)

    return model, init


def is_packed(x):
    return isinstance(x, QuantizedTensor)


def dequantized(params):
    return jax.tree.map(lambda x: x.dequantize() if is_packed(x) else x, params, is_leaf=is_packed)


def loss(adapters, model, params):
    logits, _ = lora_apply(model, {"params": params}, adapters, TOKENS[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()


OPTIMIZER = optax.adam(0.03)


def step(adapters, state, model, params):
    value, grads = jax.value_and_grad(loss)(adapters, model, params)
    updates, state = OPTIMIZER.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, (value, grads)


def test_a_matrix_takes_4_127_bits_a_weight():
    """4 of the code, 8 / 64 of the scale, 32 / (64 * 256) of the scales' scale; the mean is one a matrix."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (1024, 512))}
    _, table = quantize_params(params, {"kernel": "nf4_dq"})
    (row,) = table.arrays
    bits = 8 * row.bytes / (1024 * 512)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / (1024 * 512))
    assert bits == pytest.approx(4.127, abs=0.001)
    four = {
        name: quantize_params(params, {"kernel": (name, 64)})[1].arrays[0].error
        for name in ("fp4_e2m1", "int4")
    }
    assert row.error < 1.02 * quantize_params(params, {"kernel": "nf4"})[1].arrays[0].error
    assert row.error < min(four.values())


def test_gradients_are_those_through_the_dequantized_matrix_and_it_learns():
    model, init = make(32, 2, None)
    params, adapters = jax.jit(init)()

    @jax.jit
    def train(adapters, params):
        def one(carry, _):
            *carry, seen = step(*carry, model, params)
            return tuple(carry), seen

        return jax.lax.scan(one, (adapters, OPTIMIZER.init(adapters)), length=20)[1]

    adapters = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), adapters)
    losses, grads = jax.tree.map(np.asarray, train(adapters, params))
    dense = jax.jit(dequantized)(params)
    want_losses, want = jax.tree.map(np.asarray, train(adapters, dense))
    first = lambda grads: jax.tree.map(lambda g: g[0], grads)  # noqa: E731
    assert_close(first(grads), first(want), "float32")
    assert_close(losses[:3], want_losses[:3], "float32")
    assert losses[-1] < losses[0] - 0.4


def test_no_dense_copy_of_the_base_and_moments_of_adapters_alone():
    """The compiled step's scratch memory is below a quarter of the dense matrices of 16 layers."""
    model, init = make(256, 16, "GLU")
    params, adapters = jax.eval_shape(init)
    state = jax.eval_shape(OPTIMIZER.init, adapters)
    assert (
        sum(x.size for x in jax.tree.leaves(state)) == 2 * sum(x.size for x in jax.tree.leaves(adapters)) + 1
    )
    dense = sum(4 * x.size for x in jax.tree.leaves(params, is_leaf=is_packed) if is_packed(x))

    def scratch(params):
        run = jax.jit(
            lambda adapters, state, params: step(adapters, state, model, params), donate_argnums=(0, 1)
        )
        return run.lower(adapters, state, params).compile().memory_analysis()

    memory = scratch(params)
    assert memory.temp_size_in_bytes < dense / 4
    assert memory.argument_size_in_bytes < dense * 4.2 / 32 + 14 * 4 * sum(
        x.size for x in jax.tree.leaves(adapters)
    )


def test_merged_is_an_array_again():
    w = jnp.asarray(np.random.default_rng(0).standard_normal((70, 6)), jnp.float32)
    params, _ = quantize_params({"kernel": w}, {"kernel": "nf4_dq"})
    adapters = lora_init(jax.random.key(0), params, targets=("kernel",), rank=2, dtype=jnp.bfloat16)
    (pair,) = adapters.values()
    assert pair.a.dtype == pair.b.dtype == jnp.bfloat16
    adapters = jax.tree.map(jnp.ones_like, adapters)
    merged = lora_merge(params, adapters)
    assert_close(merged["kernel"], params["kernel"].dequantize() + 2, "float32")
    with pytest.raises(ValueError, match="params: kernel is packed; expected what lora_merge returned"):
        lora_unmerge(params, adapters)
