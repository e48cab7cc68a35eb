"""The mixture of experts against a loop over tokens, its routers, losses, states, packing and refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import frugax
from frugax.layers import MoE
from tests.errors import assert_close

B, T, D, E = 2, 6, 8, 4
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
IDS = jnp.arange(B * T).reshape(B, T) % 5
LENGTHS = jnp.array([T, 4])

# Router -> its arguments. "by token": a token's experts do not depend on the other tokens of a call.
ROUTERS = {
    "softmax_top_k": {},
    "sigmoid_top_k": {"rate": 0.25},
    "noisy_top_k": {},
    "relu_route": {"chunk": 4},
    "hash_route": {"vocab_size": 5},
    "sinkhorn_top_k": {},
    "base": {},
    "expert_choice": {},
    "soft_route": {"slots": 2},
}
BY_TOKEN = tuple(ROUTERS)[:7]
SMALL = ("softmax_top_k", "relu_route")
full = pytest.mark.full


def routers(names=tuple(ROUTERS)):
    marks = [pytest.param(name, marks=() if name in SMALL else full) for name in names]
    return pytest.mark.parametrize("name", marks)


def pairs(x):
    """A mapping as attributes of modules that jit keys on."""
    return tuple(x.items())


@functools.partial(jax.jit, static_argnames=("layer", "mutable"))
def call(layer, variables, x, mutable=(), **more):
    return (
        layer.apply(variables, x, mutable=list(mutable), **more)
        if mutable
        else layer.apply(variables, x, **more)
    )


@functools.cache
def make(name="softmax_top_k", **more):
    """(layer, variables) with weights far from zeros and ones."""
    layer = MoE(experts=E, k=2, router=name, **{"router_args": pairs(ROUTERS[name]), "expand": 1} | more)
    task = {"task": 0} if layer.tasks else {}
    variables = jax.jit(lambda key: layer.init(key, X, token_ids=IDS, **task))(jax.random.key(1))
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda p: jnp.asarray(0.6 * rng.standard_normal(p.shape), p.dtype), variables["params"]
    )
    return layer, variables | {"params": params}


def silu(x):
    return x / (1 + np.exp(-x))


def glu(x, gate_in, out):
    gate, value = np.split(x @ gate_in, 2)
    return (silu(gate) * value) @ out


def definition(params, x):
    """(y, loads) of softmax_top_k with 2 of E experts and a shared one, token by token in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    y, load = [], np.zeros(E)
    for token in np.asarray(x, np.float64).reshape(-1, D):
        scores = np.exp(token @ p["router"]["kernel"])
        best = np.argsort(-scores)[:2]
        load[best] += 1
        out = glu(token, *(p["shared"][n]["kernel"] for n in ("gate_in", "out")))
        for e in best:
            kernels = [p["experts"][n]["kernel"][e] for n in ("gate_in", "out")]
            out = out + scores[e] / scores[best].sum() * glu(token, *kernels)
        y.append(out)
    return np.reshape(y, x.shape), load / load.sum()


def test_layer_is_the_loop_over_tokens_however_they_are_sent():
    """All ways to send tokens give the definition where none is dropped, and loads and drops are told."""
    layer, variables = make(shared_expand=0.5)
    want, load = definition(variables["params"], X)
    for dispatch in ("sort", "gather", "einsum", "dense"):
        y, sown = call(layer.clone(dispatch=dispatch), variables, X, mutable=("moe",))
        assert_close(y, want, "float32", name=dispatch)
        np.testing.assert_allclose(sown["moe"]["statistics"]["routing"].load, load, rtol=1e-6)
        assert float(sown["moe"]["statistics"]["dropped"]) == 0
    few = layer.clone(dispatch="gather", capacity=2)
    _, sown = call(few, variables, X, mutable=("moe",))
    kept = np.minimum(load * B * T * 2, 2).sum()
    np.testing.assert_allclose(sown["moe"]["statistics"]["dropped"], 1 - kept / (B * T * 2), rtol=1e-6)
    losses = sown["moe"]["statistics"]["losses"]
    assert float(sown["moe"]["loss"]) == pytest.approx(1e-2 * losses["load_balance"] + 1e-3 * losses["z"])


@routers(BY_TOKEN)
def test_one_token_at_a_time_is_all_at_once(name):
    """A state-free layer decodes: a token's output does not depend on others where tokens choose."""
    layer, variables = make(name)
    y = call(layer, variables, X, token_ids=IDS)
    tokens = [call(layer, variables, X[:, t : t + 1], token_ids=IDS[:, t : t + 1]) for t in range(T)]
    assert_close(np.concatenate(tokens, 1), y, "float32")
    assert_close(call(layer.clone(dispatch="dense"), variables, X, token_ids=IDS), y, "float32")


@routers()
def test_padding_counts_nowhere(name):
    """What stands past a row's end changes neither outputs, loads, losses nor states, and gives zeros."""
    layer, variables = make(name, shared_expand=0.5)
    other = np.array(X)
    other[1, 4:] = 9.0
    calls = [
        call(layer, variables, x, ("moe", "router_state"), token_ids=IDS, lengths=LENGTHS) for x in (X, other)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *calls)
    y = np.asarray(calls[0][0])
    assert not y[1, 4:].any()
    assert y[:, :4].any()
    if name in BY_TOKEN:  # the same as without the padding
        alone = call(layer, variables, other[1:, :4], token_ids=np.asarray(IDS)[1:, :4])
        assert_close(alone[0], y[1, :4], "float32")


def test_capacity_is_of_real_tokens():
    layer, variables = make(dispatch="gather", capacity=3)
    x = np.array(X)
    x[1] = x[0, 0]  # padding stands last and asks for the first token's experts
    y, sown = call(layer, variables, x, ("moe",), lengths=np.array([1, 0]))
    y = np.asarray(y)
    assert float(sown["moe"]["statistics"]["dropped"]) == 0
    assert y[0, 0].any()
    assert not y[1].any()


@routers(("softmax_top_k", "sigmoid_top_k", "relu_route", "expert_choice"))
def test_order_of_tokens_does_not_matter(name):
    layer, variables = make(name)
    order = np.random.default_rng(3).permutation(T)
    y = np.asarray(call(layer, variables, X))
    assert_close(call(layer, variables, np.asarray(X)[::-1][:, order]), y[::-1][:, order], "float32")


def test_all_tokens_to_one_expert_and_none_to_the_rest():
    """Empty experts give nothing and get zero gradients; the full one is a GLU of its own."""
    layer, variables = make(router_args=(("normalize", False),))
    params = jax.tree.map(np.array, variables["params"])
    params["router"]["kernel"] = kernel = np.zeros((D, E), np.float32)
    kernel[0, 1:3] = 50.0, 100.0
    x = np.array(X)
    x[..., 0] = 1.0

    def loss(params):
        y = layer.apply({"params": params}, jnp.asarray(x))
        return jnp.sum(y**2), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(params)
    one = {n: {"kernel": params["experts"][n]["kernel"][2]} for n in ("gate_in", "out")}
    want = jax.jit(frugax.layers.GLU(expand=1).apply)({"params": one}, x)
    assert_close(y, want, "float32")
    for name in ("gate_in", "out"):
        g = np.asarray(grads["experts"][name]["kernel"])
        assert not g[[0, 3]].any()
        assert g[2].any()


BAD = {
    "k: got 5; expected 1 to 4": dict(k=5),
    "k: got 0": dict(k=0),
    "experts: got 0": dict(experts=0, k=0),
    "capacity: got 0 with dispatch='gather'": dict(dispatch="gather", capacity=0),
    "capacity: got 2 with dispatch='sort'": dict(capacity=2),
    "dispatch: got 'scatter'": dict(dispatch="scatter"),
    "expert: got 'GRU'": dict(expert="GRU"),
    "expand: got 0": dict(expand=0),
    "jitter: got -1.0": dict(jitter=-1.0),
    "capacity: got nan": dict(dispatch="gather", capacity=float("nan")),
    "capacity: got inf": dict(dispatch="gather", capacity=float("inf")),
    "capacity: got True": dict(dispatch="gather", capacity=True),
    "router: got 'top'; expected one of softmax_top_k": dict(router="top"),
    "router_args: softmax_top_k takes no 'rate'; expected groups": dict(router_args={"rate": 1.0}),
    "loss_weights: got 'load'; expected losses of softmax_top_k: load_balance, z": dict(
        loss_weights={"load": 1.0}
    ),
    "token_ids: got None": dict(router="hash_route", router_args={"vocab_size": 3}),
    "task: got None; expected one of 3": dict(tasks=3),
    "activation: got 'tanh'": dict(activation="tanh"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_right_is_refused(message):
    layer = MoE(**dict(experts=E) | BAD[message])

    def run():
        _, variables = make()
        return layer.init(jax.random.key(0), X), layer.apply(variables, X, mutable=["moe"])

    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jax.eval_shape(run)


def test_states_and_shapes_are_refused_by_name():
    layer, variables = make("sigmoid_top_k")
    with pytest.raises(ValueError, match=r"variables: got no 'router_state'; .* bias of sigmoid_top_k"):
        jax.eval_shape(layer.apply, {"params": variables["params"]}, X)
    layer, variables = make()
    with pytest.raises(ValueError, match=r"router_input: got \[2, 5, 8\]; expected \[2, 6, width\]"):
        jax.eval_shape(lambda x: layer.apply(variables, x, router_input=x[:, 1:]), X)
    for name in ("logits", "next_logits"):
        with pytest.raises(ValueError, match=rf"^{name}: got \[2, 6, 3\]; expected \[2, 6, {E}\]"):
            jax.eval_shape(lambda x, name=name: layer.apply(variables, x, **{name: x[..., :3]}), X)
    with pytest.raises(ValueError, match="lengths"):
        jax.eval_shape(lambda x: layer.apply(variables, x, lengths=jnp.ones(3, jnp.int32)), X)
    for shape, says in (((12, 3), "3 experts; expected 4"), ((9, E), "9 tokens; expected 12")):

        def routed(x, shape=shape):
            return layer.apply(variables, x, routing=frugax.moe.softmax_top_k(jnp.zeros(shape), 2))

        with pytest.raises(ValueError, match=f"^routing: got {says}"):
            jax.eval_shape(routed, X)
    layer, variables = make(tasks=3)
    with pytest.raises(ValueError, match="task: got 3; expected one of 3 tasks, 0 to 2"):
        jax.eval_shape(lambda x: layer.apply(variables, x, task=3), X)


def test_logits_of_slots_may_come_from_elsewhere():
    """For the paper's own logits the layer gives what it gives without; others are refused by their shape."""
    layer, variables = make("soft_route")
    kernel, scale = (np.asarray(variables["params"]["router"][n], np.float64) for n in ("kernel", "scale"))
    x = np.asarray(X, np.float64)
    x, kernel = x / np.linalg.norm(x, axis=-1, keepdims=True), kernel / np.linalg.norm(kernel, axis=0)
    logits = scale * np.einsum("btd,des->btes", x, kernel)

    @jax.jit
    def run(x, logits):
        return layer.apply(variables, x), layer.apply(variables, x, logits=logits)

    own, given = run(X, logits.astype(np.float32))
    assert_close(given, own, "float32")
    refused = {
        "logits": (logits[..., 0], rf"logits: got \[2, 6, {E}\]; expected \[2, 6, {E}, 2\]"),
        "next_logits": (logits, "next_logits: got some for soft_route"),
    }
    for name, (array, says) in refused.items():
        with pytest.raises(ValueError, match=f"^{says}"):
            jax.eval_shape(lambda x, **named: layer.apply(variables, x, **named), X, **{name: array})


@pytest.mark.nan
@pytest.mark.parametrize("name", ["softmax_top_k", pytest.param("soft_route", marks=full)])
def test_a_nan_past_the_end_of_a_row_is_in_no_gradient(name):
    layer, variables = make(name, shared_expand=0.5)

    @jax.jit
    def gradient(x):
        y = lambda params: layer.apply(variables | {"params": params}, x, lengths=LENGTHS)  # noqa: E731
        return jax.grad(lambda params: jnp.sum(y(params) ** 2))(variables["params"])

    past = np.arange(T) >= np.asarray(LENGTHS)[:, None]
    x = np.where(past[..., None], np.nan, X).astype(np.float32)
    for got, want in zip(jax.tree.leaves(gradient(x)), jax.tree.leaves(gradient(X)), strict=True):
        assert_close(got, want, "float32")


@pytest.mark.nan
@pytest.mark.parametrize("dispatch", ["sort", "gather", pytest.param("einsum", marks=full)])
def test_logits_that_are_not_finite_are_seen(dispatch):
    """Also of a token that is dropped: its output is NaN, others' are as before, and checkify raises."""
    layer, variables = make(dispatch=dispatch, capacity=1 if dispatch == "gather" else None)
    bad = np.array(X)
    bad[1, 5] = np.nan
    before, y = (np.asarray(call(layer, variables, x)) for x in (X, bad))
    assert np.isnan(y[1, 5]).all()
    if dispatch != "gather":
        np.testing.assert_array_equal(y[0], before[0])
    checked = checkify.checkify(jax.jit(layer.apply), errors=checkify.user_checks)
    failed, _ = checked(variables, bad)
    with pytest.raises(checkify.JaxRuntimeError, match="router: a logit is not finite"):
        failed.throw()
    checked(variables, X)[0].throw()
