"""One training step by its definition: parts, averages, rounding, and steps that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import frugax
from experiments.trainer import state as training_state
from experiments.trainer.state import bits_per_byte, init_state, make_train_step, params_to_use
from tests.errors import assert_close, bound, error

VOCAB = 5


class Bigram:
    """Logits of the next id by the last one: the gradient is known in closed form."""

    def __init__(self, dtype="float32"):
        self.dtype = jnp.dtype(dtype)

    def init(self, key, tokens):
        return {"params": {"kernel": jax.random.normal(key, (VOCAB, VOCAB), self.dtype)}}

    def apply(self, variables, tokens, segment_ids=None, rngs=None, mutable=False):
        out = variables["params"]["kernel"][tokens], None
        return out if mutable is False else (out, {})


def batch_of(rows, seed=0):
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCAB, (2, rows, 3)).astype(np.int32)
    weights = random.integers(0, 2, (rows, 3)).astype(np.float32)
    return dict(
        tokens=ids[0],
        targets=ids[1],
        segment_ids=np.ones((rows, 3), np.int32),
        weights=weights,
        bytes=weights.sum(1).astype(np.int32),
    )


def gradient(kernel, batch):
    """In float64: softmax less the target, averaged over weights."""
    out = np.zeros((VOCAB, VOCAB))
    logits = np.asarray(kernel, np.float64)
    for token, target, weight in zip(
        *(batch[k].ravel() for k in ("tokens", "targets", "weights")), strict=True
    ):
        p = np.exp(logits[token]) / np.exp(logits[token]).sum()
        out[token] += weight * (p - np.eye(VOCAB)[target])
    return out / batch["weights"].sum()


def run(optimizer, batches, *, dtype="float32", ema_decay=0.0, rounding="nearest", accumulate=1, skip=False):
    """The states before the first step and after each, and the metrics of each step."""
    module = Bigram(dtype)
    states = [init_state(module, optimizer, 0, ema_decay, rounding=rounding)]
    how = dict(accumulate=accumulate, ema_decay=ema_decay, skip=skip, rounding=rounding)
    step = jax.jit(make_train_step(module, optimizer, **how))
    metrics = []
    for batch in batches:
        state, values = step(states[-1], batch)
        states.append(state)
        metrics.append(values)
    return states, metrics


@pytest.mark.parametrize(("dtype", "parts"), [("float32", 1), ("bfloat16", 256)])
def test_the_gradient_of_many_parts_adds_up(dtype, parts):
    """In bfloat16 256 sums would lose 6 %; a gradient rounded once loses half a unit of its last place."""
    batch = batch_of(256)
    (start, end), _ = run(optax.sgd(1.0), [batch], dtype=dtype, accumulate=parts)
    kernel = start.params["kernel"]
    moved = np.asarray(kernel, np.float64) - np.asarray(end.params["kernel"], np.float64)
    expected = gradient(kernel, batch)
    # The params are rounded too: by half a unit of theirs.
    unit = float(jnp.finfo(dtype).eps)
    assert np.abs(moved - expected).max() < unit * (np.abs(kernel).max() + np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_average_is_that_of_optax(dtype):
    """Debiased, and in float32: after 60 steps of decay 0.999 it forgot the start, and small steps count."""
    states, _ = run(optax.sgd(0.05), [batch_of(4, i) for i in range(60)], dtype=dtype, ema_decay=0.999)
    reference = optax.ema(0.999, debias=True, accumulator_dtype=jnp.float32)
    averaging = reference.init(states[0].params)
    for state in states[1:]:
        expected, averaging = reference.update(
            jax.tree.map(lambda x: x.astype(jnp.float32), state.params), averaging
        )
    ema = params_to_use(states[-1])["kernel"]
    assert ema.dtype == jnp.float32
    assert error(ema, expected["kernel"]) < 60 * bound("float32")
    plain = np.mean([np.asarray(s.params["kernel"], np.float64) for s in states[1:]], axis=0)
    assert error(ema, plain) < 0.01  # 60 steps of 0.999 weigh almost alike


def test_a_step_that_is_not_finite_changes_nothing_but_counts():
    batches = [batch_of(4, i) for i in range(4)]
    bad = batches[1] | {"weights": batches[1]["weights"] + np.float32("inf")}
    how = dict(optimizer=optax.adam(0.1), ema_decay=0.9, skip=True)
    states, metrics = run(batches=[batches[0], bad, batches[2], batches[3]], **how)
    assert [int(values["skipped_steps"]) for values in metrics] == [0, 1, 1, 1]
    assert not np.isfinite(metrics[1]["loss"])
    without, _ = run(batches=[batches[0], batches[2], batches[3]], **how)
    for name in ("params", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(states[2], name), getattr(states[1], name))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            getattr(states[-1], name),
            getattr(without[-1], name),
        )
    assert (int(states[-1].step), int(states[-1].skipped)) == (4, 1)


def test_small_updates_of_narrow_params_count_by_stochastic_rounding():
    """Steps below half a unit: rounded to nearest nothing moves; at random, the mean moves as it should."""
    batches = [batch_of(64, i) for i in range(30)]
    wide, _ = run(optax.sgd(1e-3), batches)
    nearest, _ = run(optax.sgd(1e-3), batches, dtype="bfloat16")
    big = np.abs(np.asarray(nearest[0].params["kernel"], np.float32)) > 0.5
    np.testing.assert_array_equal(nearest[0].params["kernel"][big], nearest[-1].params["kernel"][big])
    random, _ = run(optax.sgd(1e-3), batches, dtype="bfloat16", rounding="stochastic")
    assert random[-1].params["kernel"].dtype == jnp.bfloat16
    moved = np.asarray(random[-1].params["kernel"], np.float64) - np.asarray(
        random[0].params["kernel"], np.float64
    )
    expected = np.asarray(wide[-1].params["kernel"] - wide[0].params["kernel"], np.float64)
    # Each of 30 steps rounds an entry of size 1 by a unit of 2**-7 at most: the sum of 25 entries' errors.
    assert abs((moved - expected).sum()) < 4 * 2**-8 * np.sqrt(30 * moved.size)
    assert np.count_nonzero(moved) > 5


def test_momentum_of_narrow_params_is_wide_where_rounding_is_stochastic():
    states, _ = run(optax.adam(1e-3), [batch_of(4)], dtype="bfloat16", rounding="stochastic")
    dtypes = {x.dtype.name for x in jax.tree.leaves(states[-1].optimizer) if x.ndim}
    assert dtypes == {"float32"}


@pytest.mark.parametrize("split", [False, True])
def test_schedule_free_gives_its_average(split):
    """x = (y - (1 - b1) z) / b1, also where matrices and the rest have rules of their own."""
    rule = lambda decay: optax.contrib.schedule_free_sgd(0.5, b1=0.9, weight_decay=decay)  # noqa: E731
    labels = {"kernel": "matrix", "bias": "other"}
    optimizer = optax.partition({"matrix": rule(0.1), "other": rule(0.1)}, labels) if split else rule(0.1)
    params = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)}
    state, params_seen = optimizer.init(params), params
    single = rule(0.1)
    single_state = single.init(params)
    for seed in range(3):
        grads = jax.tree.map(lambda x, seed=seed: jax.random.normal(jax.random.key(seed), x.shape), params)
        updates, state = optimizer.update(grads, state, params_seen)
        _, single_state = single.update(grads, single_state, params_seen)
        params_seen = optax.apply_updates(params_seen, updates)
    train_state = init_state(Bigram(), optax.sgd(1.0), 0, 0.0)._replace(params=params_seen, optimizer=state)
    expected = optax.contrib.schedule_free_eval_params(single_state, params_seen)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params_to_use(train_state), expected
    )
    assert not np.allclose(expected["kernel"], params_seen["kernel"])


def test_an_evaluation_stops_when_asked():
    batches = [batch_of(2, i) for i in range(3)]
    module = Bigram()
    params = module.init(jax.random.key(0), None)["params"]
    asked = []
    assert bits_per_byte(module, params, batches, lambda: asked.append(0) or len(asked) > 2) is None
    assert bits_per_byte(module, params, batches) > 0


def test_a_mixture_of_experts_trains_with_its_losses_and_states():
    """One step of gradient descent is that of cross entropy and auxiliary loss; the router's bias moves."""
    arguments = {"experts": 3, "k": 1, "router": "sigmoid_top_k", "expand": 1}
    arguments |= {"loss_weights": {"load_balance": 1.0}}
    block = frugax.layers.Block("MLGRU", "MoE", channel_args=arguments)
    module = frugax.layers.Decoder(VOCAB, 8, (block,), repeats=2, backend="xla")
    state = init_state(module, optax.sgd(1.0), 0, 0.0)
    batch = batch_of(2)
    new, metrics = jax.jit(make_train_step(module, optax.sgd(1.0), accumulate=1, ema_decay=0.0))(state, batch)

    def loss(params):
        variables = {"params": params, **state.collections}
        how = dict(segment_ids=batch["segment_ids"], mutable=["moe"])
        (logits, _), sown = module.apply(variables, batch["tokens"], **how)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        nats = jnp.sum(nats * batch["weights"]) / batch["weights"].sum()
        losses = sown["moe"]["layers"]["block_0"]["channel"]["loss"]
        return nats + losses.sum(), (nats, losses.sum())

    grads, (nats, auxiliary) = jax.jit(jax.grad(loss, has_aux=True))(state.params)
    assert error(metrics["loss"], nats) < bound("float32")
    assert error(metrics["auxiliary_loss"], auxiliary) < bound("float32")
    moved = jax.tree.map(lambda old, new: old - new, state.params, new.params)
    assert_close(moved["layers"], grads["layers"], "float32", times=4)
    assert 0 < float(metrics["load_entropy"]) <= 1
    assert float(metrics["dropped_share"]) == 0
    (bias,) = jax.tree.leaves(new.collections)
    assert bias.shape == (2, 3)
    np.testing.assert_allclose(abs(bias).max(), 1e-3, rtol=1e-5)
    assert not jax.tree.leaves(state.collections)[0].any()


@pytest.mark.full
@pytest.mark.parametrize("accumulate", [1, 2])
def test_states_of_routers_are_the_same_on_all_devices(accumulate):
    """Devices move by their own loads and take the mean; parts go one after the other."""
    arguments = {"experts": 3, "k": 1, "router": "sigmoid_top_k", "expand": 1}
    block = frugax.layers.Block("MLGRU", "MoE", channel_args=arguments)
    module = frugax.layers.Decoder(VOCAB, 8, (block,), backend="xla")
    state = init_state(module, optax.sgd(0.1), 0, 0.0)
    how = dict(accumulate=accumulate, ema_decay=0.0, axis_name="data")
    batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch_of(4))
    step = jax.vmap(make_train_step(module, optax.sgd(0.1), **how), (None, 0), axis_name="data")
    new, metrics = jax.jit(step)(state, batch)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[1]), (new.params, new.collections, metrics))
    (bias,) = jax.tree.leaves(new.collections)
    steps = np.asarray(bias[0] / 5e-4)  # half a step of the rate, or whole ones
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert 0 < abs(steps).max() <= 2 * accumulate
    assert 0 < float(metrics["load_entropy"][0]) <= 1


@pytest.mark.parametrize(
    "head",
    [
        {"ternary_head": True, "tie_embeddings": False},
        pytest.param({"tie_embeddings": False}, marks=pytest.mark.full),
        pytest.param({}, marks=pytest.mark.full),
        pytest.param({"low_bit": "nvfp4"}, marks=pytest.mark.full),
    ],
    ids=["ternary", "untied", "tied", "low_bit"],
)
def test_a_loss_in_tiles_is_the_loss(head):
    """The same loss and step, with packed documents, over 3 tiles of 7 tokens; no logits of all tokens."""
    V, head = 13, dict(head)
    low_bit = head.pop("low_bit", "")
    block = frugax.layers.Block("LightningAttention", "MLP", {"heads": 2}, {"expand": 2})
    module = frugax.layers.Decoder(V, 8, (block,), backend="xla", **head)
    if low_bit:
        module = frugax.quant.training.LowBit(module, low_bit)
    rows = batch_of(4)
    random = np.random.default_rng(1)
    batch = {k: np.concatenate([v, v, v[:, :1]], axis=1) for k, v in rows.items() if k != "bytes"}
    batch |= {k: random.integers(0, V, (4, 7)).astype(np.int32) for k in ("tokens", "targets")}
    batch |= {"bytes": rows["bytes"], "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2]] * 4, np.int32)}
    optimizer = optax.sgd(1.0)
    state = init_state(module, optimizer, 0, 0.0)
    how = {"accumulate": 2, "ema_decay": 0.0}
    whole, tiles = (make_train_step(module, optimizer, **how, loss_tiles=n) for n in (1, 3))
    want, got = (jax.jit(step)(state, batch) for step in (whole, tiles))
    assert_close(got[1], want[1], "float32")
    of_params = [(new.params, state.params) for new, _ in (got, want)]
    moved = [jax.tree.map(jnp.subtract, new, old) for new, old in of_params]
    assert_close(*moved, "float32", times=4)  # the gradient's size is that of params, which round too
    shapes = [str(jax.make_jaxpr(step)(state, batch)) for step in (whole, tiles)]
    assert [f"f32[2,7,{V}]" in text for text in shapes] == [True, False]


def test_an_evaluation_makes_few_logits_at_a_time(monkeypatch):
    block = frugax.layers.Block("MLGRU", None)
    module = frugax.layers.Decoder(13, 8, (block,), backend="xla")
    tokens = np.random.default_rng(0).integers(0, 13, (2, 2, 7)).astype(np.int32)
    batch = dict(tokens=tokens[0], targets=tokens[1], segment_ids=np.ones((2, 7), np.int32))
    batch |= dict(weights=np.ones((2, 7), np.float32), bytes=np.ones(2, np.int32))
    params = jax.jit(module.init)(jax.random.key(0), tokens[0])["params"]
    bits, programs = [], []
    for logits in (2**25, 4 * 13):  # all, and a token of each row at a time
        monkeypatch.setattr(training_state, "LOGITS", logits)
        training_state._nats.clear_cache()
        bits.append(bits_per_byte(module, params, [batch]))
        programs.append(
            str(jax.make_jaxpr(lambda p: training_state._nats(module, {"params": p}, batch))(params))
        )
    np.testing.assert_allclose(*bits, rtol=bound("float32"))
    assert ["f32[2,7,13]" in text for text in programs] == [True, False]
