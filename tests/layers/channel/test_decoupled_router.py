"""The router ahead of a model: its definition in float64, causality, and choices for layers of experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import frugax
from frugax import moe
from tests.errors import assert_close

B, T, V, E, D = 2, 11, 13, 4, 16
ROUTER = frugax.layers.DecoupledRouter(vocab_size=V, experts=E, layers=3, width=D)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(V, size=(B, T)), jnp.int32)


@functools.cache
def compiled():
    """(variables, apply) with norms and biases that all matter."""
    variables = jax.jit(ROUTER.init)(jax.random.key(1), TOKENS)
    rng = np.random.default_rng(2)
    noisy = lambda x: jnp.asarray(x + 0.1 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return jax.tree.map(noisy, jax.tree.map(np.asarray, variables)), jax.jit(ROUTER.apply)


def definition(params, tokens) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * p[name]["weight"]

    def turned(x):  # [T, N] by position
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1
        )

    x = p["embedding"][np.asarray(tokens)]
    for i in range(2):
        mixer = p[f"mixer_{i}"]
        qkv = norm(x, f"mixer_norm_{i}") @ mixer["qkv"]["kernel"]
        heads = []
        for h in range(2):
            q, k, v = (part[:, h * D // 2 : (h + 1) * D // 2] for part in np.split(qkv, 3, -1))
            score = turned(q) @ turned(k).T / np.sqrt(D // 2)
            score = np.where(np.tri(len(x)) > 0, np.exp(score - score.max()), 0)
            heads.append(score / score.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, -1) @ mixer["out"]["kernel"]
        inner = norm(x, f"mlp_norm_{i}") @ p[f"mlp_{i}"]["in"]["kernel"]
        x = x + (inner / (1 + np.exp(-inner))) @ p[f"mlp_{i}"]["out"]["kernel"]
    return (norm(x, "norm") @ p["out"]["kernel"] + p["out"]["bias"]).reshape(len(x), 3, E)


def test_logits_are_the_definition_whole_and_in_parts():
    variables, apply = compiled()
    tokens = np.asarray(TOKENS)
    want = np.stack([definition(variables["params"], row) for row in tokens])
    logits, _ = apply(variables, TOKENS)
    assert logits.shape == (B, T, 3, E)
    assert_close(logits, want, "float32")
    parts, state = [], None
    for piece in (tokens[:, :6], tokens[:, 6:]):
        part, state = apply(variables, piece, state=state)
        parts.append(part)
    assert_close(np.concatenate(parts, 1), want, "float32")
    # Two documents in a row are as if apart.
    ids = np.broadcast_to(np.arange(T) >= 6, (B, T)).astype(np.int32)
    packed, _ = apply(variables, TOKENS, segment_ids=ids)
    apart = np.stack([definition(variables["params"], row[6:]) for row in tokens])
    assert_close(np.asarray(packed)[:, 6:], apart, "float32")


def mixture():
    """A layer of experts without a router, its variables and tokens."""
    layer = frugax.layers.MoE(experts=E, expand=1, dispatch="dense")
    x = jnp.asarray(np.random.default_rng(3).standard_normal((B, T, 8)), jnp.float32)

    @jax.jit
    def init(key, x):
        return layer.init(key, x, routing=moe.softmax_top_k(jnp.zeros((B * T, E)), 1))

    return layer, init(jax.random.key(4), x), x


def test_choices_serve_layers_of_experts():
    """One expert of weight 1 for each layer, which has no router of its own."""
    variables, apply = compiled()
    layer, of_layer, x = mixture()
    assert set(of_layer["params"]) == {"experts"}
    kernels = jax.tree.map(lambda a: np.asarray(a, np.float64), of_layer["params"]["experts"])
    flat = np.asarray(x, np.float64).reshape(B * T, -1)
    logits = np.asarray(apply(variables, TOKENS)[0]).reshape(B * T, 3, E)
    run = jax.jit(lambda logits: layer.apply(of_layer, x, routing=moe.softmax_top_k(logits, 1)))
    for i in (0, 2):
        chosen = logits[:, i].argmax(-1)
        assert len(np.unique(chosen)) > 1
        into, out = (kernels[name]["kernel"][chosen] for name in ("gate_in", "out"))
        gate, value = np.split(np.einsum("td,tdh->th", flat, into), 2, -1)
        want = np.einsum("th,thd->td", gate / (1 + np.exp(-gate)) * value, out)
        assert_close(np.asarray(run(logits[:, i])).reshape(B * T, -1), want, "float32")


@pytest.mark.full
def test_gradients_reach_all_of_the_router_by_the_weights():
    variables, _ = compiled()
    layer, of_layer, x = mixture()

    def loss(params):
        logits = ROUTER.apply({"params": params}, TOKENS)[0].reshape(B * T, 3, E)
        routings = [moe.softmax_top_k(logits[:, i], 2) for i in range(3)]
        return sum(jnp.sum(layer.apply(of_layer, x, routing=routing) ** 2) for routing in routings)

    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("attributes", "tokens", "says"),
    [
        ({"experts": 0}, TOKENS, "experts: got 0; expected at least 1"),
        ({"layers": 0}, TOKENS, "layers: got 0"),
        ({"heads": 5}, TOKENS, "heads: got 5"),
        ({}, TOKENS[0].astype(jnp.int32), r"tokens: got int32\[11\]"),
        ({}, TOKENS.astype(jnp.float32), r"tokens: got float32\[2, 11\]"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bad_input(attributes, tokens, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(ROUTER.clone(**attributes).init, jax.random.key(0), tokens)
