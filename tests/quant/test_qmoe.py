"""Experts: statistics of the tokens that each was sent, and QMoE's ternary weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from frugax.compress import compress_ternary
from frugax.formats import quantize
from frugax.quant import Statistics, calibrate, qmoe, quantize_params
from tests.errors import assert_close, error
from tests.quant import definition

K, N = 13, 3
SIZES = [40, 0, 7, 2]


@pytest.mark.parametrize("slots", [False, pytest.param(True, marks=pytest.mark.full)])
def test_statistics_of_groups_are_those_of_each(slots):
    rows = definition.inputs(sum(SIZES) + 3, K)  # three rows are past all groups
    ends = np.cumsum([0, *SIZES])
    x = rows
    if slots:
        x = np.stack([np.resize(rows[a:b] if b > a else rows, (40, K)) for a, b in itertools.pairwise(ends)])
    found = jax.jit(Statistics.of_groups)(jnp.asarray(x), jnp.asarray(SIZES))
    for e, size in enumerate(SIZES):
        mine = jax.tree.map(lambda a, e=e: a[e], found)
        assert mine.count == size
        if size:
            assert_close(mine, Statistics.of(jnp.asarray(rows[ends[e] : ends[e + 1]])), "float32")
        else:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(mine))


def test_experts_are_tuned_to_their_tokens_unless_these_are_few():
    x = jnp.asarray(definition.inputs(sum(SIZES), K))
    w = jnp.asarray(definition.weights(len(SIZES), K, N))

    @jax.jit
    def run(x, w):
        statistics = Statistics.of_groups(x, jnp.asarray(SIZES))
        q = qmoe(w, statistics, least_inputs=5)
        return statistics.gram, q.dequantize(), quantize(w, "ternary_minmax", axis=-2).dequantize()

    gram, found, nearest = map(np.asarray, run(x, w))
    for e, size in enumerate(SIZES):
        want = nearest[e]
        if size >= 5:
            want = definition.obq(w[e], gram[e], "ternary_minmax", K, damping=0.1)
            assert (want != nearest[e]).any()
        np.testing.assert_allclose(found[e], want, rtol=1e-5, atol=1e-6)


def routed(x, params, k):
    """By expert, the tokens that it is sent: the k largest logits of each."""
    chosen = np.argsort(-(x @ np.asarray(params["router"]["kernel"])), -1)[:, :k]
    return [x[(chosen == e).any(-1)] for e in range(params["experts"]["out"]["kernel"].shape[0])]


@pytest.mark.parametrize(
    "dispatch", ["sort", *(pytest.param(d, marks=pytest.mark.full) for d in ("gather", "dense"))]
)
def test_calibration_gathers_the_tokens_of_each_expert(dispatch):
    layer = frugax.layers.MoE(experts=4, k=2, expand=1, dispatch=dispatch, remat=True)
    x = [jax.random.normal(jax.random.key(i), (2, 50, 8)) for i in range(2)]
    params = jax.jit(layer.init)(jax.random.key(9), x[0])["params"]
    found = calibrate(layer, {"params": params}, x, only="experts")
    assert list(found) == ["experts/gate_in/kernel", "experts/out/kernel"]
    assert found["experts/out/kernel"].gram.shape == (4, 8, 8)
    experts = jax.tree.map(lambda w: np.asarray(w, np.float64), params["experts"])
    for e, tokens in enumerate(routed(np.concatenate(x).reshape(-1, 8), params, 2)):
        gate, value = np.split(tokens @ experts["gate_in"]["kernel"][e], 2, axis=-1)
        hidden = gate / (1 + np.exp(-gate)) * value
        for name, inputs in (("gate_in", tokens), ("out", hidden)):
            mine = jax.tree.map(lambda a, e=e: a[e], found[f"experts/{name}/kernel"])
            assert mine.count == len(tokens)
            assert_close(mine, Statistics.of(jnp.asarray(inputs, jnp.float32)), "float32", name=name)


@pytest.mark.full
def test_experts_of_layers_under_a_scan_are_stacked_and_run_in_codewords():
    block = frugax.layers.Block("MLGRU", "MoE", {}, {"experts": 3, "k": 1, "expand": 1})
    model = frugax.layers.Decoder(16, 8, (block,), 2, remat=True, backend="xla")
    tokens = jax.random.randint(jax.random.key(0), (4, 40), 0, 16)
    params = jax.jit(model.init)(jax.random.key(1), tokens)["params"]
    statistics = calibrate(model, {"params": params}, [tokens], only="experts")
    (path, first), (_, out) = statistics.items()
    assert path == "layers/block_0/channel/experts/gate_in/kernel"
    assert first.gram.shape == out.gram.shape == (2, 3, 8, 8)
    assert first.count.sum(-1).tolist() == out.count.sum(-1).tolist() == [160, 160]
    packed, _ = quantize_params(params, {"experts": lambda path, w: qmoe(w, statistics[path])})
    is_packed = lambda x: isinstance(x, frugax.formats.QuantizedTensor)  # noqa: E731
    small = jax.tree.map(lambda x: compress_ternary(x) if is_packed(x) else x, packed, is_leaf=is_packed)
    run = jax.jit(lambda params: model.apply({"params": params}, tokens)[0])
    assert_close(run(small), run(packed), "float32")


def trained(width=32, steps=150):
    """A layer that was trained to imitate a network, and inputs with few directions: trained on, and new."""
    layer = frugax.layers.MoE(experts=4, k=1, expert="MLP", activation="relu", expand=2, backend="xla")
    x = jnp.asarray(definition.inputs(1600, width)).reshape(2, 8, 100, width) / 6
    first, second = (jax.random.normal(jax.random.key(i), (width, width)) / width**0.5 for i in range(2))
    params = jax.jit(layer.init)(jax.random.key(2), x[0])["params"]
    adam = optax.adam(3e-3)

    def loss(params, x):
        y, sown = layer.apply({"params": params}, x, mutable=["moe"])
        return jnp.mean((y - jnp.sin(3 * x @ first) @ second) ** 2) + frugax.moe.total_loss(sown)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, x[0])
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), value

    train = jax.jit(lambda params: jax.lax.scan(step, (params, adam.init(params)), length=steps))
    (params, _), losses = train(params)
    assert losses[-1] < 0.5 * losses[0]
    return layer, params, x


@pytest.mark.full
def test_gptq_beats_rounding_to_the_nearest_in_a_trained_layer():
    """The outputs on new inputs; the layer runs packed experts, and those in codewords."""
    layer, params, (x, new) = trained()
    statistics = calibrate(layer, {"params": params}, [x], only="experts")
    rules = {
        "nearest": lambda path, w: quantize(w, "ternary_minmax", axis=-2),
        "gptq": lambda path, w: qmoe(w, statistics[path]),
    }
    run = jax.jit(lambda params: layer.apply({"params": params}, new))
    want, errors = run(params), {}
    for name, rule in rules.items():
        packed, _ = quantize_params(params, {"experts": rule})
        errors[name] = error(run(packed), want)
    assert errors["gptq"] < 0.8 * errors["nearest"], errors
    small = jax.tree.map(compress_ternary, packed["experts"], is_leaf=lambda x: hasattr(x, "dequantize"))
    assert_close(run(params | {"experts": small}), run(packed), "float32")


@pytest.mark.full
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_methods_take_experts_by_their_tokens(method):
    """Of a stack each expert is quantized by its own statistics, as alone."""
    x = jnp.asarray(definition.inputs(sum(SIZES), K))
    statistics = Statistics.of_groups(x, jnp.asarray(SIZES))
    w = jnp.asarray(definition.weights(len(SIZES), K, N))
    run = functools.partial(getattr(frugax.quant, method), format="int4", group_size=5)
    together = run(w, statistics)
    for e in range(len(SIZES)):
        alone = run(w[e], jax.tree.map(lambda a, e=e: a[e], statistics))
        for mine, want in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(mine[e], want, rtol=1e-4)


@pytest.mark.parametrize(
    ("w", "how", "message"),
    [
        (jnp.ones((3, K, N)), {}, "statistics.gram: got"),
        (jnp.ones((4, K, N)), {"least_inputs": -1}, "least_inputs: got -1"),
        (jnp.ones((4, K, N)), {"damping": -1.0}, "damping: got -1.0"),
    ],
)
def test_bad_input(w, how, message, unchecked_types):
    statistics = Statistics(*(jnp.zeros((4, *shape)) for shape in ((K, K), (K,), (K,), (K,), ())))
    with pytest.raises(ValueError, match=message):
        qmoe(w, statistics, **how)
