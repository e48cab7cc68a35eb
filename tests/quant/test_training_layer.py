"""Low-bit products in Flax modules: any decoder trains by a recipe, and histories are carried."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

import frugax
from frugax.quant.training import LowBit, LowBitDotGeneral, Recipe, low_bit_dot
from tests.errors import assert_close, error

DELAYED = Recipe("fp8_e4m3", "fp8_e5m2", None, "float32", stochastic=False, history=2)
TOKENS = jnp.array([[1, 2, 3, 0, 4]])


def decoder():
    block = frugax.layers.Block("MLGRU", None)
    return frugax.layers.Decoder(vocab_size=5, width=8, blocks=(block,), repeats=2)


def loss(module, variables, rngs=None):
    logits, _ = module.apply(variables, TOKENS, rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


def test_a_dense_layer_multiplies_by_the_recipe():
    x = jax.random.normal(jax.random.key(0), (3, 4, 20))
    layer = nn.Dense(6, dot_general_cls=functools.partial(LowBitDotGeneral, recipe="nvfp4"))
    heads = nn.DenseGeneral((2, 3), axis=(-2, -1), dot_general_cls=layer.dot_general_cls)

    @jax.jit
    def found_and_expected(x):
        (y, of_y), (z, of_z) = (m.init_with_output(jax.random.key(1), x) for m in (layer, heads))
        kernels = of_y["params"]["kernel"], of_z["params"]["kernel"].reshape(80, 6)
        expected = low_bit_dot(x, kernels[0], "nvfp4"), low_bit_dot(x.reshape(3, 80), kernels[1], "nvfp4")
        return (y, z.reshape(3, 6)), expected

    assert_close(*found_and_expected(x), "float32")


def test_every_dense_layer_of_a_decoder_trains_in_few_bits():
    low = LowBit(decoder(), DELAYED)
    variables = jax.jit(low.init)(jax.random.key(0), TOKENS)
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(
        jax.eval_shape(decoder().init, jax.random.key(0), TOKENS)["params"]
    )
    kernels = [p for p, _ in jax.tree_util.tree_leaves_with_path(variables["params"]) if "kernel" in str(p)]
    histories = jax.tree.leaves(variables[OVERWRITE_WITH_GRADIENT])
    assert len(histories) == 3 * len(kernels) == 6
    assert {h.shape for h in histories} == {(2, 2)}  # repeats, history

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(loss, 1)(low, state.params))

    state = TrainState.create(apply_fn=low.apply, params=variables, tx=optax.sgd(0.1))
    for filled in (1, 2):
        state = step(state)
        for history in jax.tree.leaves(state.params[OVERWRITE_WITH_GRADIENT]):
            assert ((np.asarray(history) > 0).sum(-1) == filled).all()


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["fp8_current", "nvfp4"])
def test_gradients_of_a_decoder_are_near_the_exact_ones(recipe):
    params = jax.jit(decoder().init)(jax.random.key(0), TOKENS)
    exact, found = (
        jax.jit(jax.grad(lambda v, module=module: loss(module, v, rngs={"low_bit": jax.random.key(1)})))(
            params
        )
        for module in (decoder(), LowBit(decoder(), recipe))
    )
    wrong = [error(f, e) for f, e in zip(*map(jax.tree.leaves, (found, exact)), strict=True)]
    assert 0 < max(wrong) < {"fp8_current": 0.3, "nvfp4": 1.0}[recipe]
    assert 0 < np.median(wrong) < {"fp8_current": 0.2, "nvfp4": 0.6}[recipe]


@pytest.mark.full
def test_keys_round_each_layer_and_step_anew():
    low = LowBit(decoder(), "nvfp4", where="mixer/out")
    variables = low.init(jax.random.key(0), TOKENS)
    gradient = jax.jit(jax.grad(lambda v, key: low.apply(v, TOKENS, rngs={"low_bit": key})[0][..., 0].sum()))
    one, again, other = (gradient(variables, jax.random.key(i)) for i in (1, 1, 2))
    assert error(one["params"]["embedding"], again["params"]["embedding"]) == 0
    assert error(one["params"]["embedding"], other["params"]["embedding"]) > 1e-3
    with pytest.raises(ValueError, match="key: got None"):
        jax.grad(lambda v: low.apply(v, TOKENS)[0].sum())(variables)


def test_bad_input_is_named():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"^where: got 'head' for Decoder"):
        jax.eval_shape(LowBit(decoder(), "nvfp4", where="head").init, jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match=r"^recipe: got 'fp3'"):
        jax.eval_shape(LowBit(decoder(), "fp3").init, jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match=r"^dimension_numbers: "):
        LowBitDotGeneral("nvfp4").apply({}, x, x, (((0,), (0,)), ((), ())))
