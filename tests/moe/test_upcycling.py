"""Dense layers made into mixtures compute what they did, through the layer itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax import moe
from tests.errors import assert_close

D, E, T = 12, 5, 17
X = jax.random.normal(jax.random.key(0), (2, T, D))
DENSE = {
    "GLU": frugax.layers.GLU(expand=2),
    "MLP": frugax.layers.MLP(expand=2, activation="gelu"),
}


@functools.cache
def dense(kind):
    return jax.jit(DENSE[kind].init_with_output)(jax.random.key(1), X)


def layer(kind, k=2, **more):
    return frugax.layers.MoE(experts=E, k=k, expert=kind, expand=2, activation=DENSE[kind].activation, **more)


@pytest.mark.parametrize("kind", ["GLU", pytest.param("MLP", marks=pytest.mark.full)])
def test_function_is_kept(kind):
    """Whatever the router says; and by a shared expert beside copies that give nothing."""
    want, variables = dense(kind)
    params = variables["params"]
    apply = jax.jit(layer(kind).apply)
    for key in (None, jax.random.key(2)):
        made = moe.upcycle(params, E, key=key, router_scale=1.0)
        assert_close(apply({"params": made}, X), want, "float32")
    assert float(jnp.std(made["router"]["kernel"])) == pytest.approx(1, rel=0.3)
    beside = jax.jit(layer(kind, shared_expand=2).apply)
    for scale in (0.0, 1.0):
        made = moe.upcycle(params, E, key=jax.random.key(2), shared=True, expert_scale=scale)
        assert_close(beside({"params": made}, X), (1 + scale) * want, "float32")
    # The tree is that of the layer, array by array.
    fresh = jax.eval_shape(layer(kind, shared_expand=2).init, jax.random.key(0), X)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, fresh)


def test_ternary_experts_that_give_nothing_leave_the_shared_one():
    """MoTE's form at its start; ternary copies of the dense layer are near it, and learn."""
    want, variables = dense("GLU")
    beside = layer("GLU", k=1, ternary=True, shared_expand=2, shared_frozen=True)
    made = moe.upcycle(variables["params"], E, key=jax.random.key(2), shared=True, expert_scale=0.0)

    def loss(params):
        y = beside.apply({"params": params}, X)
        return jnp.sum(y**2), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(made)
    assert_close(y, want, "float32")
    assert float(jnp.abs(grads["experts"]["out"]["kernel"]).max()) > 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads["shared"]))


@pytest.mark.full
def test_noise_makes_experts_differ():
    params = dense("GLU")[1]["params"]
    made = moe.upcycle(params, E, key=jax.random.key(3), noise=0.1)["experts"]
    for name in ("gate_in", "out"):
        off = np.asarray(made[name]["kernel"] - params[name]["kernel"])
        rms = float(jnp.sqrt(jnp.mean(params[name]["kernel"] ** 2)))
        np.testing.assert_allclose(off.std((1, 2)), 0.1 * rms, rtol=0.2)
        assert abs(np.corrcoef(off.reshape(E, -1)) - np.eye(E)).max() < 0.3
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    made = moe.upcycle(half, 2, key=jax.random.key(3), noise=0.1)
    assert made["router"]["kernel"].dtype == jnp.float32
    assert {x.dtype.name for x in jax.tree.leaves(made["experts"])} == {"bfloat16"}


@pytest.mark.full
def test_a_decoder_is_upcycled_under_its_scan():
    def model(channel, args):
        block = frugax.layers.Block("SlidingWindowAttention", channel, {"heads": 2, "window": 4}, args)
        return frugax.layers.Decoder(vocab_size=11, width=8, blocks=(block,), repeats=3)

    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    small = model("GLU", {"expand": 2})
    (want, _), variables = jax.jit(small.init_with_output)(jax.random.key(1), tokens)
    params = variables["params"]
    block = params["layers"]["block_0"]
    channel = jax.vmap(lambda p: moe.upcycle(p, 4))(block["channel"])
    params = params | {"layers": {"block_0": block | {"channel": channel}}}
    large = model("MoE", {"expand": 2, "experts": 4})
    logits, _ = jax.jit(large.apply)({"params": params}, tokens)
    assert_close(logits, want, "float32")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: moe.upcycle(p, 0), "experts: got 0"),
        (lambda p: moe.upcycle(p, 2, noise=0.1), "key: got None with noise=0.1"),
        (lambda p: moe.upcycle({"r": p["out"]}, 2), r"params: got \['r'\]; expected those of a GLU"),
        (
            lambda p: moe.upcycle(frugax.quant.quantize_params(p, {"kernel": "int8"})[0], 2),
            "params: got QuantizedTensor for gate_in's kernel",
        ),
        (
            lambda p: moe.upcycle(jax.tree.map(lambda x: x[None], p), 2),
            r"got \[1, 12, 48\] for gate_in's kernel",
        ),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call(dense("GLU")[1]["params"])
