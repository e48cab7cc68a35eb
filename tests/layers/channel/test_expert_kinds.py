"""Ternary, packed, shared, sparse and many small experts; gradients of all by finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax.layers import GLU, MLP
from tests.errors import assert_close

from .test_moe import IDS, LENGTHS, D, E, X, call, full, make


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


GRADIENTS = {
    "softmax_top_k": dict(loss_weights=(("load_balance", 1.0), ("z", 1.0)), shared_expand=0.5, remat=True),
    "sigmoid_top_k": dict(loss_weights=(("load_balance", 1.0),), expert="MLP", activation="gelu"),
    "noisy_top_k": dict(loss_weights=(("importance", 1.0), ("load", 1.0))),
    "relu_route": dict(
        router_args=(("chunk", 4), ("steepness", 1.0)),
        loss_weights=(("activation_locality", 1.0), ("chunk_sparsity", 1.0)),
        dispatch="dense",
    ),
    "expert_choice": {},
    "soft_route": {},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "softmax_top_k" else full) for n in GRADIENTS]
)
def test_gradients_are_finite_differences(name):
    """Of all params and the input, through experts, weights and auxiliary losses."""
    layer, variables = make(name, **GRADIENTS[name])
    rest = {n: x for n, x in variables.items() if n != "params"}
    rng = np.random.default_rng(5)
    cotangent = jnp.asarray(rng.standard_normal(X.shape), jnp.float32)
    key = {"router": jax.random.key(3)}

    @jax.jit
    def loss(params, x):
        y, sown = layer.apply({"params": params, **rest}, x, lengths=LENGTHS, mutable=["moe"], rngs=key)
        return jnp.vdot(y, cotangent) + frugax.moe.total_loss(sown)

    at = (variables["params"], X)
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, at))
    grads = [np.asarray(g) for g in jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(*at))]
    assert all(g.any() for g in grads)
    for i, g in enumerate(grads):
        direction = rng.standard_normal(g.shape)
        direction /= np.sqrt(np.sum(direction**2))
        h = 1e-2
        moved = [
            [*leaves[:i], leaves[i] + np.float32(s * h) * direction.astype(np.float32), *leaves[i + 1 :]]
            for s in (1, -1)
        ]
        up, down = (float(loss(*jax.tree.unflatten(structure, m))) for m in moved)
        # Second differences are of h^2, rounding of eps / h.
        limit = 3e-3 * max(float(np.linalg.norm(g)), 1.0)
        assert abs((up - down) / (2 * h) - float(np.vdot(g, direction))) < limit, (name, i)


@pytest.mark.parametrize("ternary", [True, pytest.param(False, marks=full)])
def test_packed_experts_are_the_rounded_ones(ternary):
    """Ternary kernels in 2 bits give what training gave; int8 ones what decoding them gives."""
    layer, variables = make(ternary=ternary, shared_expand=0.5)
    format = "ternary" if ternary else "int8"
    rules = {"experts/.*kernel": format}
    packed, table = frugax.quant.quantize_params(variables["params"], rules)
    y = call(layer, {"params": packed}, X)
    if ternary:
        want = call(layer, variables, X)
        weights = E * 3 * D * D
        assert sum(row.bytes for row in table.arrays) == weights // 4 + 2 * E * 4  # 2 bits, and scales
    else:
        decoded = jax.tree.map(
            lambda w: w.dequantize() if isinstance(w, frugax.formats.QuantizedTensor) else w,
            packed,
            is_leaf=lambda w: isinstance(w, frugax.formats.QuantizedTensor),
        )
        want = call(layer, {"params": decoded}, X)
    assert_close(y, want, "float32")
    assert rms(want - call(layer.clone(ternary=False), variables, X)) > 1e-3 * rms(want)  # it was rounded
    for dispatch in ("gather", "dense"):
        assert_close(call(layer.clone(dispatch=dispatch), {"params": packed}, X), want, "float32")


@full
def test_a_decoder_runs_packed_experts():
    block = frugax.layers.Block("MLGRU", "MoE", channel_args={"experts": E, "ternary": True})
    model = frugax.layers.Decoder(5, D, (block,), repeats=2)
    params = model.init(jax.random.key(0), IDS)["params"]
    packed, _ = frugax.quant.quantize_params(params, {"experts/.*kernel": "ternary"})
    (want, _), (got, _) = (jax.jit(model.apply)({"params": p}, IDS) for p in (params, packed))
    assert_close(got, want, "float32")


def test_a_frozen_shared_expert_and_nothing_else_is_the_dense_layer():
    """MoTE's start: experts that give zeros leave the GLU; no gradient reaches it, and all others learn."""
    layer, variables = make(ternary=True, shared_expand=1, shared_frozen=True)
    params = dict(variables["params"])
    silent = {n: {"kernel": np.zeros_like(k["kernel"])} for n, k in params["experts"].items()}
    y = call(layer, {"params": params | {"experts": silent}}, X)
    want = jax.jit(GLU(expand=1).apply)({"params": params["shared"]}, X)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(layer.apply({"params": p}, X) ** 2)))(params)
    assert not any(g.any() for g in jax.tree.leaves(grads["shared"]))
    assert all(g.any() for g in jax.tree.leaves((grads["experts"], grads["router"])))


@full
def test_ternary_gradients_pass_straight_through():
    """Those of a layer with rounded kernels and rounded rows, as if these were not rounded."""
    layer, variables = make(ternary=True, expert="MLP", activation=None)
    params = variables["params"]
    round_ = frugax.formats.fake_quantize

    def by_hand(params, x):
        flat = x.reshape(-1, D)
        routing = frugax.moe.softmax_top_k(flat @ params["router"]["kernel"], 2)
        weights = routing.dense_weights(len(flat))
        w_in, w_out = (round_(params["experts"][n]["kernel"], "ternary", axis=1) for n in ("in", "out"))
        h = jnp.einsum("td,edh->teh", round_(flat, "int8", axis=-1), w_in)
        y = jnp.einsum("teh,ehd->ted", round_(h, "int8", axis=-1), w_out)
        return jnp.sum(jnp.einsum("ted,te->td", y, weights) ** 2)

    got = jax.jit(jax.grad(lambda p, x: jnp.sum(layer.apply({"params": p}, x) ** 2), (0, 1)))(params, X)
    assert_close(got, jax.jit(jax.grad(by_hand, (0, 1)))(params, X), "float32")


@pytest.mark.nan
def test_blockffn_skips_what_no_token_activates():
    """Experts that no token activates are not read, and the rest is the dense evaluation of all."""
    layer, variables = make("relu_route", expert="MLP", activation="silu")
    params = jax.tree.map(np.array, variables["params"])
    x = np.array(X)
    x[..., 0] = 1.0
    params["router"]["kernel"][0, 1] = -50.0  # never active
    scores = np.maximum(np.asarray(x, np.float64) @ np.asarray(params["router"]["kernel"], np.float64), 0)
    gates = (
        scores / np.sqrt((scores**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(params["router"]["gain"])
    )
    want = np.zeros(x.shape)
    for e in range(E):
        kernels = [np.asarray(params["experts"][n]["kernel"][e], np.float64) for n in ("in", "out")]
        h = np.asarray(x, np.float64) @ kernels[0]
        want += gates[..., e : e + 1] * ((h / (1 + np.exp(-h))) @ kernels[1])
    assert_close(call(layer.clone(dispatch="dense"), {"params": params}, x), want, "float32")
    unread = jax.tree.map(np.copy, params["experts"])
    for k in unread.values():
        k["kernel"][1] = np.nan
    y, sown = call(layer, {"params": params | {"experts": unread}}, x, ("moe",))
    assert_close(y, want, "float32")
    load = np.asarray(sown["moe"]["statistics"]["routing"].load)
    assert load[1] == 0
    np.testing.assert_allclose(load, (gates != 0).sum((0, 1)) / (gates != 0).sum(), rtol=1e-6)
    np.testing.assert_allclose(sown["moe"]["statistics"]["active"], (gates != 0).sum(-1).mean(), rtol=1e-6)


def test_blockffn_losses_keep_to_documents():
    """Chunks and neighbours are of one document: those of packed rows are those of the documents apart."""
    layer, variables = make("relu_route")
    ids = jnp.array([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]])
    _, sown = call(layer, variables, X, ("moe",), segment_ids=ids)
    losses = sown["moe"]["statistics"]["losses"]
    kernel = np.asarray(variables["params"]["router"]["kernel"], np.float64)
    logits = np.asarray(X, np.float64) @ kernel
    used, crossed = [], []
    for row, start, stop in ((0, 0, 4), (0, 4, 6), (1, 0, 2), (1, 2, 6)):
        one = logits[row, start:stop]
        p = np.maximum(one, 0) / (np.maximum(one, 0).sum(-1, keepdims=True) + 1e-5)
        used += [1 - np.prod(1 - p[i : i + 4] + 1e-5, 0) for i in range(0, len(one), 4)]
        before, target = 100 * one[:-1], 1 / (1 + np.exp(-100 * one[1:]))
        crossed += [np.logaddexp(0, before) - before * target]
    np.testing.assert_allclose(losses["chunk_sparsity"], np.mean(used), rtol=1e-6)
    np.testing.assert_allclose(losses["activation_locality"], np.mean(np.concatenate(crossed)), rtol=1e-6)


@pytest.mark.nan
@pytest.mark.parametrize("block", [3, pytest.param(64, marks=full)])
def test_neurons_without_a_gate_are_not_read(block):
    """Equal to dense ReGLU to the last bit where sums are exact; what skipped neurons hold is not seen."""
    rng = np.random.default_rng(7)
    H = 8
    whole = lambda *shape: rng.integers(-3, 4, shape).astype(np.float32)  # noqa: E731
    kernels = {"gate_in": whole(E, D, 2 * H), "out": whole(E, H, D)}
    x, indices, weights = whole(D), np.array([2, 0]), np.array([0.5, 0.25], np.float32)
    chosen = jnp.asarray(indices), jnp.asarray(weights)
    sparse = jax.jit(lambda x, kernels: frugax.moe.sparse_reglu(x, *chosen, kernels, block=block))
    spread = np.zeros((1, E), np.float32)
    spread[0, indices] = weights
    dense = jax.jit(partial(frugax.moe.dense_experts, activation=jax.nn.relu))
    want = np.asarray(dense(x[None], spread, kernels))[0]
    assert want.any()
    np.testing.assert_array_equal(sparse(x, kernels), want)
    gates = np.einsum("d,edh->eh", x, kernels["gate_in"][:, :, :H])
    assert 0 < (gates[indices] <= 0).sum() < 2 * H
    unread = {n: k.copy() for n, k in kernels.items()}
    for e in range(E):
        off = gates[e] <= 0
        unread["gate_in"][e][:, H:][:, off] = np.nan
        unread["out"][e][off] = np.nan
    np.testing.assert_array_equal(sparse(x, unread), want)
    x[0] = np.nan
    assert np.isnan(sparse(x, kernels)).all()


@full
def test_the_layer_in_bfloat16_and_under_x64():
    layer, variables = make(shared_expand=0.5)
    want = call(layer, variables, X)
    y = call(layer.clone(dtype=jnp.bfloat16), variables, X)
    assert y.dtype == jnp.bfloat16
    # Six roundings in a row, of x, products and gates, half a unit each at most: their squares add up.
    assert_close(y.astype(jnp.float32), want, "bfloat16", times=2)
    with jax.enable_x64(True):
        for name in ("softmax_top_k", "relu_route", "sigmoid_top_k"):
            layer, variables = make(name)
            y, sown = layer.apply(variables, X, mutable=["moe", "router_state"])
            assert y.dtype == jnp.float32
            assert frugax.moe.total_loss(sown).shape == ()


@full
def test_routers_by_task_and_routing_from_elsewhere():
    """Task 1's router is that of a layer with its matrix; a ready routing needs no router at all."""
    layer, variables = make(tasks=3)
    params = dict(variables["params"])
    one = params | {"router": {"kernel": params["router"]["kernel"][1]}}
    want = call(layer.clone(tasks=None), {"params": one}, X)
    assert_close(call(layer, variables, X, task=1), want, "float32")
    assert rms(want - call(layer, variables, X, task=2)) > 1e-2 * rms(want)
    routing = frugax.moe.softmax_top_k(X.reshape(-1, D) @ one["router"]["kernel"], 2)
    no_router = {"params": {"experts": params["experts"]}}
    assert_close(call(layer, no_router, X, routing=routing), want, "float32")
    reads = jnp.concatenate([X, X], -1)
    wide = params | {"router": {"kernel": jnp.concatenate([one["router"]["kernel"] / 2] * 2)}}
    got = call(layer.clone(tasks=None), {"params": wide}, X, router_input=reads)
    assert_close(got, want, "float32")


@full
def test_an_mlp_of_one_expert_is_an_mlp():
    layer = frugax.layers.MoE(experts=1, k=1, expert="MLP", activation="relu2", expand=2)
    variables = layer.init(jax.random.key(0), X)
    one = jax.tree.map(lambda k: k[0], variables["params"]["experts"])
    assert_close(call(layer, variables, X), MLP(expand=2).apply({"params": one}, X), "float32")
