"""The optimizer that a config describes: its schedule, its clipping, and what decays."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

from experiments.trainer.optimizers import check_optimizer, make_optimizer, matrices, schedule
from tests.experiments.runs import tiny_config

PARAMS = {
    "embedding": jnp.ones((5, 4)),
    "layers": {
        "mixer": {
            "kernel": jnp.ones((2, 4, 6)),
            "bias": jnp.ones((2, 6)),
            "conv": jnp.ones((2, 3, 4)),
            "A_log": jnp.ones((2, 4, 3)),
            "D": jnp.ones((2, 4)),
            "dt_bias": jnp.ones((2, 4)),
        }
    },
    "norm": {"weight": jnp.ones(4)},
}


def optimizer_config(**fields):
    config = tiny_config("corpus", "run").optimizer
    config.update(fields)
    return config


def zero_gradient_updates(**fields):
    config = optimizer_config(**dict(warmup_steps=0, learning_rate=0.1, weight_decay=0.5) | fields)
    optimizer = make_optimizer(config, 10)
    check_optimizer(config, optimizer, PARAMS)
    gradient = jax.tree.map(jnp.zeros_like, PARAMS)
    return jax.jit(lambda: optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)[0])()


def assert_equal(updates, expected):
    jax.tree.map(
        lambda a, b: jnp.allclose(a, b, atol=1e-6) or pytest.fail(f"{a} is not {b}"), updates, expected
    )


SHRINKING = ("adamw", "muon", "adafactor_8bit", "adamw_8bit")  # by weight decay times the learning rate
MORE = ("adafactor", "adamaxw", "adan", "lion", "lion_8bit", "nadamw", "apollo")
OTHERS = ("novograd", "schedule_free_adamw", "schedule_free_sgd", "lamb", "madgrad")  # in units of their own


@pytest.mark.parametrize("name", [*SHRINKING, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_only_matrices_decay(name):
    """A stack of biases has two axes too, and A_log, D and dt_bias shape a recurrence's memory."""
    options = ConfigDict({"rank": 2}) if name == "apollo" else ConfigDict()
    updates = zero_gradient_updates(name=name, options=options)
    expected = jax.tree.map(lambda matrix, x: -0.05 * x if matrix else 0 * x, matrices(PARAMS), PARAMS)
    mixer = {"kernel": True, "bias": False, "conv": False, "A_log": False, "D": False, "dt_bias": False}
    assert matrices(PARAMS)["layers"]["mixer"] == mixer
    assert_equal(updates, expected)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "schedule_free_adamw" else pytest.param(name, marks=pytest.mark.full)
        for name in OTHERS
    ],
)
def test_optimizers_without_a_mask_decay_matrices_only(name):
    updates = zero_gradient_updates(name=name)
    for matrix, update in zip(*map(jax.tree.leaves, (matrices(PARAMS), updates)), strict=True):
        assert jnp.all(update < 0) if matrix else jnp.all(update == 0)


def test_no_decay_is_none():
    """Optax's adamw decays by 1e-4 if nobody says otherwise."""
    assert_equal(zero_gradient_updates(weight_decay=0.0), jax.tree.map(jnp.zeros_like, PARAMS))


def test_a_pattern_says_what_decays_instead():
    updates = zero_gradient_updates(decay="mixer/(conv|bias)$|^embedding")
    moved = {
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, x in jax.tree_util.tree_leaves_with_path(updates)
        if x.any()
    }
    assert moved == {"conv", "bias", "embedding"}
    with pytest.raises(ValueError, match=r"optimizer\.decay: got 'attention'"):
        zero_gradient_updates(decay="attention")


def test_eight_bits_are_set_by_a_config():
    """Moments in 8 bits, but for embeddings; the smallest size and the group's are numbers."""
    moments = ConfigDict(dict(min_size=1, group_size=2, signed="dynamic8", full_precision="embedding"))
    config = optimizer_config(name="adamw_8bit", options=ConfigDict({"moments": moments}))
    state = jax.eval_shape(make_optimizer(config, 20).init, PARAMS)
    (eight_bit,) = [
        x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "moments")) if hasattr(x, "moments")
    ]
    first = eight_bit.moments[0]
    assert first["embedding"].dtype == jnp.float32
    assert first["norm"]["weight"].format.name == "dynamic8"
    moments.rows = 3
    with pytest.raises(ValueError, match=r"optimizer\.options\.moments: .*rows"):
        make_optimizer(config, 20)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            dict(name="lbfgs", weight_decay=0.0),
            "optimizer.name: got 'lbfgs'; expected one that works from a schedule",
        ),
        (dict(name="sm3", weight_decay=0.0), "optimizer.name: got 'sm3'"),
        (dict(name="momo", weight_decay=0.0), "optimizer.name: got 'momo'"),
        (dict(name="mezo_step", weight_decay=0.0), "optimizer.name: got 'mezo_step'"),
        (dict(name="ScaleByZoomLinesearchState"), "optimizer.name: got 'ScaleByZoomLinesearchState'"),
        (dict(name="prodigy"), "optimizer.weight_decay: got 0.5; expected 0 for prodigy"),
        (dict(name="dadapt_adamw"), "optimizer.weight_decay: got 0.5; expected 0 for dadapt_adamw"),
        (dict(name="adam"), "optimizer.weight_decay: got 0.5; expected 0 for adam"),
        (dict(name="galore", options={"rank": 0}), "optimizer.options.rank: got 0"),
        (dict(name="galore", options={"rank": 9}), "optimizer.options.rank: got 9"),
        (dict(name="muon", options={"ns_steps": 0}), "optimizer.options.ns_steps: got 0"),
    ],
)
def test_optimizers_that_a_config_cannot_have(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        zero_gradient_updates(**fields | {"options": ConfigDict(fields.get("options", {}))})


def test_muon_takes_each_layer_of_a_stack_by_itself():
    gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), PARAMS)
    config = optimizer_config(name="muon", warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, 10)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
    updates = update(gradient, PARAMS)
    for layer in range(2):
        one = {"kernel": PARAMS["layers"]["mixer"]["kernel"][layer]}
        of_one = update({"kernel": gradient["layers"]["mixer"]["kernel"][layer]}, one)
        kernel = updates["layers"]["mixer"]["kernel"][layer]
        assert jnp.allclose(kernel, of_one["kernel"], rtol=1e-4)
        # Five Newton-Schulz steps bring every singular value near 1, times the learning rate and its scale.
        values = jnp.linalg.svd(kernel, compute_uv=False) / (config.learning_rate * 0.2 * 6**0.5)
        assert jnp.all((values > 0.5) & (values < 1.5))


def test_the_schedule_warms_up_and_ends_at_its_fraction():
    rate = schedule(optimizer_config(warmup_steps=4, learning_rate=1.0, final_fraction=0.1), 20)
    assert float(rate(0)) == pytest.approx(1 / 4)
    assert float(rate(4)) == pytest.approx(1.0)
    assert float(rate(12)) == pytest.approx(0.55)
    assert float(rate(20)) == pytest.approx(0.1)


def test_an_option_that_an_optimizer_does_not_take_is_named():
    with pytest.raises(
        ValueError, match=r"optimizer\.options\.ns_steps: got 3; expected an argument of adamw, .*b1"
    ):
        make_optimizer(optimizer_config(options=ConfigDict({"ns_steps": 3})), 10)


def test_clipping_bounds_the_gradient():
    config = optimizer_config(name="sgd", warmup_steps=0, learning_rate=1.0, weight_decay=0.0, clip_norm=0.5)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5)


def test_lamb_by_config_moves_each_matrix_by_its_own_size():
    """The trust ratio: an update as long as the rate times the weights, whatever the gradient's size."""
    config = optimizer_config(name="lamb", warmup_steps=0, learning_rate=0.1, weight_decay=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, 10)
    check_optimizer(config, optimizer, PARAMS)
    params = {"a": {"kernel": jnp.full((3, 4), 2.0)}, "b": {"kernel": jnp.full((4, 5), 0.5)}}
    grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    for scale in (1.0, 100.0):
        scaled = jax.tree.map(lambda g, scale=scale: scale * g, grads)
        updates, _ = optimizer.update(scaled, optimizer.init(params), params)
        for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert float(jnp.linalg.norm(u)) == pytest.approx(0.1 * float(jnp.linalg.norm(p)), rel=1e-5)
