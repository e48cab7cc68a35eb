"""Mixtures of experts in a decoder: by config, and routed by the block's input or by the mixture before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import frugax
from frugax.layers import Block, Decoder, MoE
from tests.errors import assert_close

V, D, E, REPEATS = 7, 8, 4, 3
TOKENS = jnp.asarray(np.random.default_rng(0).integers(V, size=(2, 5)), jnp.int32)
ARGUMENTS = {"experts": E, "k": 2, "expand": 1}


def make(blocks, **more):
    model = Decoder(V, D, blocks, **{"repeats": REPEATS} | more)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: jnp.asarray(0.5 * rng.standard_normal(p.shape), p.dtype), shapes["params"]
    )
    return model, {"params": params}


def layer_by_layer(model, params, block):
    """(logits, experts of each layer) by calls of the parts, with gates where the papers have them."""
    params = jax.tree.map(np.asarray, params)
    x = params["embedding"][np.asarray(TOKENS)]
    used, before = [], None
    norm, mixer = frugax.layers.RMSNorm(), frugax.layers.GatedConvolution(width=2)

    @jax.jit
    def mixed(p, x):
        x = x + mixer.apply({"params": p["mixer"]}, norm.apply({"params": p["mixer_norm"]}, x))[0]
        return x, norm.apply({"params": p["channel_norm"]}, x)

    experts = jax.jit(lambda p, h, scores: MoE(**ARGUMENTS).apply({"params": p}, h, logits=scores))
    for layer in range(REPEATS):
        p = jax.tree.map(lambda a, layer=layer: a[layer], params["layers"]["block_0"])
        entering, (x, h) = x, map(np.asarray, mixed(p, x))
        if block.router_reads == "previous":
            scores = (h if before is None else before) @ params["pre_gates"][layer]
        else:
            scores = entering @ p["channel"]["router"]["kernel"]
        before = h
        used.append(np.argsort(-scores.reshape(-1, E), -1)[:, :2])
        x = x + np.asarray(experts(p["channel"], h, scores))
    x = np.asarray(jax.jit(norm.apply)({"params": params["norm"]}, x))
    return x @ params["embedding"].T, used


@pytest.mark.parametrize("reads", ["previous", pytest.param("block", marks=pytest.mark.full)])
def test_experts_are_known_early(reads):
    """Logits are those of the parts; what is announced is what is used, and it needs no later input."""
    block = Block("GatedConvolution", "MoE", {"width": 2}, ARGUMENTS, router_reads=reads)
    model, variables = make((block,))
    params = variables["params"]
    assert ("pre_gates" in params) == (reads == "previous")
    assert ("router" in params["layers"]["block_0"]["channel"]) == (reads == "block")
    (logits, _), sown = jax.jit(functools.partial(model.apply, mutable=["moe"]))(variables, TOKENS)
    want, used = layer_by_layer(model, params, block)
    assert_close(logits, want, "float32")
    told = sown["moe"]["layers"]["block_0"]["channel"]
    np.testing.assert_array_equal(told["chosen"], np.stack(used))
    if reads == "previous":
        np.testing.assert_array_equal(told["announced"][:-1], told["chosen"][1:])


@pytest.mark.full
def test_pre_gates_cross_blocks_of_a_repeat_and_decode():
    """Two pre-gated mixtures in a repeat are the same in one, and token by token is all at once."""
    block = Block("GatedConvolution", "MoE", {"width": 2}, ARGUMENTS, router_reads="previous")
    plain = Block("GatedConvolution", None, {"width": 2})
    model, variables = make((block, plain, block), repeats=2, remat=True)
    (logits, _), sown = model.apply(variables, TOKENS, mutable=["moe"])
    first, second = (sown["moe"]["layers"][name]["channel"] for name in ("block_0", "block_2"))
    np.testing.assert_array_equal(first["announced"], second["chosen"])
    np.testing.assert_array_equal(second["announced"][:1], first["chosen"][1:])
    state, one = None, jax.jit(model.apply)
    for t in range(TOKENS.shape[1]):
        got, state = one(variables, TOKENS[:, t : t + 1], state)
        assert_close(got[:, 0], logits[:, t], "float32", times=2)

    def loss(params):
        return jnp.sum(model.apply({"params": params}, TOKENS)[0] ** 2)

    grads = jax.grad(loss)(variables["params"])["pre_gates"]
    assert (jnp.abs(grads).max((1, 2)) > 0).all()  # N gates for N mixtures, and each is used


def test_what_a_block_cannot_route_is_refused():
    refused = [
        (dict(channel="GLU", router_reads="block"), "router_reads: got 'block' with channel='GLU'"),
        (dict(channel="MoE", router_reads="next"), "router_reads: got 'next'; expected one of channel"),
        (
            dict(channel="MoE", router_reads="previous", channel_args={"router": "relu_route"}),
            "router_reads: got 'previous' with router='relu_route'",
        ),
    ]
    for fields, message in refused:
        with pytest.raises(ValueError, match=message):
            Block("GatedConvolution", **fields)
    soft = Decoder(V, D, (Block("MLGRU", "MoE", channel_args={"router": "soft_route"}),))
    with pytest.raises(ValueError, match="router: got 'soft_route', which mixes in later tokens"):
        jax.eval_shape(soft.init, jax.random.key(0), TOKENS)
    blocks = [Block("MLGRU", "MoE", channel_args={"experts": e}, router_reads="previous") for e in (4, 8)]
    with pytest.raises(ValueError, match=r"blocks: got \[4, 8\] experts with router_reads='previous'"):
        jax.eval_shape(Decoder(V, D, tuple(blocks)).init, jax.random.key(0), TOKENS)


ROUTERS = {
    "softmax_top_k": {"groups": 2},
    "sigmoid_top_k": {},
    "noisy_top_k": {},
    "sinkhorn_top_k": {},
    "base": {},
    "relu_route": {},
    "hash_route": {"vocab_size": V},
    "expert_choice": {},
}


@pytest.mark.full
@pytest.mark.parametrize("router", ROUTERS)
def test_every_causal_router_trains_in_a_decoder(router):
    """Inside the scan over depth, with a key and states of their own for each layer."""
    arguments = ARGUMENTS | {"router": router, "router_args": ROUTERS[router]}
    model = Decoder(V, D, (Block("GatedConvolution", "MoE", {"width": 2}, arguments),), repeats=REPEATS)
    tokens = TOKENS[:, :4]
    variables = model.init(jax.random.key(0), tokens)
    params = variables["params"]
    rest = {name: x for name, x in variables.items() if name != "params"}

    def loss(params):
        how = dict(rngs={"router": jax.random.key(1)}, mutable=["moe", *rest])
        (logits, _), new = model.apply({"params": params, **rest}, tokens, **how)
        return jnp.sum(logits**2) + frugax.moe.total_loss(new), new

    grads, new = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    routed = grads["layers"]["block_0"]["channel"].get("router", {})
    assert all(g.any() for g in jax.tree.leaves(routed))
    assert bool(routed) == (router != "hash_route")
    summary = frugax.moe.load_summary(new)
    assert 0 < float(summary["load_entropy"]) <= 1
    if router == "hash_route":
        (table,) = jax.tree.leaves(new["router_state"])
        assert table.shape == (REPEATS, V)
        assert (table[0] != table[1]).any()
        assert set(np.bincount(table[0], minlength=E)) <= {1, 2}
    if router in ("sigmoid_top_k", "hash_route"):
        _, state = model.apply(variables, tokens)
        whole = model.apply(variables, tokens)[0]
        first, state = model.apply(variables, tokens[:, :3])
        assert_close(first, whole[:, :3], "float32")
        last, _ = model.apply(variables, tokens[:, 3:], state)
        assert_close(last, whole[:, 3:], "float32")


@pytest.mark.full
@pytest.mark.parametrize("dispatch", ["sort", "gather", "dense"])
def test_any_batch_runs_an_exported_decoder(dispatch, unchecked_types):
    block = Block("GatedConvolution", "MoE", {"width": 2}, ARGUMENTS | {"dispatch": dispatch})
    model, variables = make((block,), repeats=2)
    (batch,) = export.symbolic_shape("batch")
    call = jax.jit(lambda tokens: model.apply(variables, tokens)[0])
    exported = export.export(call)(jax.ShapeDtypeStruct((batch, TOKENS.shape[1]), TOKENS.dtype))
    assert_close(exported.call(TOKENS), call(TOKENS), "float32")
