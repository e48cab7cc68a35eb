"""Policies of rematerialization: the same gradients, what each keeps, and where."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import deviceless_gpu, deviceless_tpu
from frugax.layers import Block, Decoder
from frugax.memory import POLICIES, remat_policy
from tests.errors import assert_close

V, D = 11, 8
WAYS = [*((name, False) for name in POLICIES), ("full", True), ("dots_without_batch", True)]


def dense(**memory):
    """A decoder of three layers, in which every product is one with params."""
    block = Block("MLGRU", "GLU", channel_args={"expand": 4})
    return Decoder(V, D, (block,), 3, tie_embeddings=False, backend="xla", **memory)


def loss_of(model, tokens):
    return lambda variables: jnp.sum(jnp.sin(model.apply(variables, tokens)[0]))


def kept(model):
    """The widths of what a layer keeps of each token for the backward pass: residuals [3, 2, 13, ...]."""
    tokens = jnp.zeros((2, 13), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    pull = jax.eval_shape(lambda v: jax.vjp(loss_of(model, tokens), v)[1], shapes)
    return sorted(x.size // (3 * 2 * 13) for x in jax.tree.leaves(pull) if x.shape[:2] == (3, 2))


def test_what_policies_keep():
    """Dense layers keep inputs, or also the products of MLGRU (3 gates and its output) and GLU (2 of 32)."""
    assert kept(dense(remat="full")) == kept(dense(remat=True)) == [D]
    assert kept(dense(remat="dots")) == [D, D, 3 * D, 2 * 4 * D]
    assert sum(kept(dense())) > 3 * sum(kept(dense(remat="dots")))


def test_products_of_activations_are_not_products_with_params():
    """Scores y y^T [2, 13, 13] are kept by "dots" alone, and y = x w [2, 13, 5] by both."""

    def f(x, w):
        y = x @ w
        return jnp.sum(jnp.sin(jnp.einsum("btk,bsk->bts", y, y)))

    def shapes(name):
        pull = jax.eval_shape(
            lambda x, w: jax.vjp(jax.checkpoint(f, policy=remat_policy(name)), x, w)[1], x, w
        )
        return {leaf.shape for leaf in jax.tree.leaves(pull)} - {()}

    x, w = jnp.ones((2, 13, D)), jnp.ones((D, 5))
    assert shapes("full") == {x.shape, w.shape}
    assert shapes("dots_without_batch") == {x.shape, w.shape, (2, 13, 5)}
    assert shapes("dots") == {x.shape, w.shape, (2, 13, 5), (2, 13, 13)}


def test_offload_sends_to_the_host():
    """As the program says; whether the chip's compiler does it, the full tier asks. CPU's does not."""
    tokens = jnp.zeros((2, 13), jnp.int32)
    shapes = jax.eval_shape(dense().init, jax.random.key(0), tokens)

    def sent(**memory):
        text = str(jax.make_jaxpr(jax.grad(loss_of(dense(**memory), tokens)))(shapes))
        return set(re.findall(r"f32<host>\[(3,2,13,\d+)\]", text))

    assert sent(remat="dots_without_batch") == set()
    assert sent(remat="full", offload=True) == {f"3,2,13,{D}"}
    assert sent(remat="dots_without_batch", offload=True) == {f"3,2,13,{n * D}" for n in (1, 3, 8)}


@pytest.mark.full
@pytest.mark.parametrize(("name", "offload"), WAYS)
def test_every_policy_changes_no_number(name, offload):
    """With documents, attention's products over the batch, and two layers a repeat."""
    blocks = (Block("SlidingWindowAttention", "MLP", {"heads": 2, "window": 4}), Block("HGRN2", "GLU"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(V, size=(2, 13)), jnp.int32)
    ids = jnp.asarray([[0] * 5 + [1] * 8, [3] * 13])
    model = Decoder(V, D, blocks, 2, backend="xla")
    variables = model.init(jax.random.key(0), tokens)

    def run(model):
        f = lambda v: jnp.sum(jnp.sin(model.apply(v, tokens, segment_ids=ids)[0]))  # noqa: E731
        return jax.jit(jax.value_and_grad(f))(variables)

    assert_close(run(model.clone(remat=name, offload=offload)), run(model), "float32")


def on_chip(chip, **memory):
    """The memory of a gradient of eight layers compiled for a chip, and the bytes of a layer's input."""
    B, T, width = 2, 4096, 256
    block = Block("LinearAttention", "GLU", {"heads": 2}, {"expand": 4})
    model = Decoder(64, width, (block,), 8, dtype=jnp.bfloat16, backend="xla", **memory)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    f = jax.grad(lambda variables, tokens: loss_of(model, tokens)(variables))
    if chip == "h200":
        compiled = deviceless_gpu.compile_for_h200(f, shapes, tokens)
    else:
        compiled = deviceless_tpu.compile_for(chip, f, shapes, tokens)
    return compiled.memory_analysis(), 2 * B * T * width


@pytest.mark.full
@pytest.mark.deviceless
@pytest.mark.parametrize("chip", ["v5e", "h200"])
def test_offloaded_activations_are_on_the_host(chip):
    """With "full" the eight inputs leave the device; with the products their results too."""
    here, layer = on_chip(chip, remat="full")
    there, _ = on_chip(chip, remat="full", offload=True)
    assert here.host_temp_size_in_bytes == 0
    assert there.host_temp_size_in_bytes == pytest.approx(8 * layer, rel=0.02)
    assert there.temp_size_in_bytes < here.temp_size_in_bytes - 4 * layer
    here, _ = on_chip(chip, remat="dots_without_batch")
    there, _ = on_chip(chip, remat="dots_without_batch", offload=True)
    assert there.host_temp_size_in_bytes > 8 * 8 * layer
    assert there.temp_size_in_bytes < 0.6 * here.temp_size_in_bytes


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"remat": "dot"}, "remat: got 'dot'; expected one of 'none', 'dots', 'dots_without_batch', 'full'"),
        ({"offload": True}, "offload: got True with remat='none'; expected 'full' or 'dots_without_batch'"),
        ({"remat": "dots", "offload": True}, "offload: got True with remat='dots'"),
        ({"mlp_tiles": 0}, "mlp_tiles: got 0 with channel mixers GLU; expected a number >= 1"),
    ],
)
def test_what_a_decoder_can_not_keep_is_named(memory, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(dense(**memory).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))


def test_other_channel_mixers_are_not_tiled():
    model = Decoder(V, D, (Block("MLGRU", "MoE"),), mlp_tiles=2)
    with pytest.raises(ValueError, match="mlp_tiles: got 2 with channel mixers MoE; expected"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="name: got 'none', which is no checkpoint"):
        remat_policy("none")


@pytest.mark.full
def test_mlp_tiles_change_no_number():
    tokens = jnp.asarray(np.random.default_rng(0).integers(V, size=(2, 13)), jnp.int32)
    variables = dense().init(jax.random.key(0), tokens)
    run = lambda model: jax.jit(jax.value_and_grad(loss_of(model, tokens)))(variables)  # noqa: E731
    assert_close(run(dense(mlp_tiles=3, remat=True)), run(dense()), "float32")
    one, _ = dense(mlp_tiles=3).apply(variables, tokens[:, :1])  # decoding
    assert_close(one, dense().apply(variables, tokens[:, :1])[0], "float32")


@pytest.mark.parametrize(
    "head",
    [
        pytest.param({"tie_embeddings": True}, marks=pytest.mark.full),  # a loss in tiles has it
        {"tie_embeddings": False},
        pytest.param({"tie_embeddings": False, "ternary_head": True}, marks=pytest.mark.full),
    ],
    ids=["tied", "untied", "ternary"],
)
def test_hidden_values_and_the_head_are_logits(head):
    model = dense().clone(**head)
    tokens = jnp.asarray(np.random.default_rng(0).integers(V, size=(2, 13)), jnp.int32)
    variables = model.init(jax.random.key(0), tokens)
    want, _ = model.apply(variables, tokens, lengths=jnp.array([13, 4]))
    x, _ = model.apply(variables, tokens, lengths=jnp.array([13, 4]), hidden=True)
    got = model.apply(variables, x, method="head")
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1, :4], want[1, :4])
    assert x.shape == (2, 13, D)
