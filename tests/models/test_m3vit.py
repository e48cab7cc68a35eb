"""M3ViT: routers by task, the shared router by hand, experts one by one, and single-task work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from frugax import layers, moe
from frugax.models import M3ViT
from tests.errors import assert_close

MODEL = M3ViT(
    tasks=3, width=16, pairs=1, patch=4, mixer=layers.LinearAttention(heads=2), moe_args={"experts": 6}
)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 10, 8, 1)), jnp.float32)


@pytest.fixture(scope="module", params=["router", pytest.param("embedding", marks=pytest.mark.full)])
def case(request):
    model = MODEL.clone(gate=request.param)
    return model, jax.jit(model.init)(jax.random.key(0), X, 0)["params"]


def definition(model, params, x, own, task):
    """All experts on all tokens, of which the four best of the task's router count."""
    kernel, D = own["router"]["kernel"], x.shape[-1]
    if model.gate == "router":
        logits = x @ kernel[task]
    else:
        hidden = jax.nn.gelu(params["task_in"]["kernel"][task] + params["task_in"]["bias"])
        about = hidden @ params["task_out"]["kernel"] + params["task_out"]["bias"]
        about = (about - about.mean()) / jnp.sqrt(about.var() + 1e-6)
        logits = x @ kernel[:D] + about @ kernel[D:]
    fourth = jnp.sort(logits, -1)[..., -4, None]
    weights = jnp.where(logits >= fourth, jnp.exp(logits), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    hidden = jax.nn.gelu(jnp.einsum("btd,edh->bteh", x, own["experts"]["in"]["kernel"]))
    return jnp.einsum("bteh,ehd,bte->btd", hidden, own["experts"]["out"]["kernel"], weights)


def test_a_task_chooses_its_experts(case):
    """The model with the definition in place of its experts; and experts one by one are the same."""
    model, params = case

    def by_hand(call, args, named, context):
        if not isinstance(context.module, layers.MoE) or context.method_name != "__call__":
            return call(*args, **named)
        return definition(model, params, args[0], context.module.variables["params"], by_hand.task)

    @jax.jit
    def wanted(params, task):
        by_hand.task = task
        with nn.intercept_methods(by_hand):
            return model.apply({"params": params}, X, task)

    run = jax.jit(model.apply)
    outs = [run({"params": params}, X, task) for task in range(3)]
    for task, y in enumerate(outs):
        assert_close(y, wanted(params, task), jnp.float32)
    assert all(np.abs(np.subtract(outs[a], outs[b])).max() > 1e-3 for a, b in ((0, 1), (1, 2)))
    one_by_one = model.clone(moe_args=dict(model.moe_args) | {"dispatch": "expert_major"})
    assert_close(jax.jit(one_by_one.apply)({"params": params}, X, 2), outs[2], jnp.float32)


def test_training_moves_the_router_of_its_task_alone(case):
    model, params = case

    def loss(params):
        how = {"mutable": ["moe"], "rngs": {"router": jax.random.key(1)}}
        y, sown = model.apply({"params": params}, X, 1, **how)
        return jnp.mean(y[..., 0]) + moe.total_loss(sown)

    grads = jax.jit(jax.grad(loss))(params)["pairs"]["experts"]["router"]
    for name in ("kernel", "noise"):
        moved = np.abs(np.asarray(grads[name][0])).max((-2, -1)) > 0
        assert moved.tolist() == ([False, True, False] if model.gate == "router" else True)


def test_a_shared_encoder_has_no_experts():
    """And costs as much: four of the experts make one of its MLPs."""
    shared = MODEL.clone(moe_args=None)
    params = jax.eval_shape(shared.init, jax.random.key(0), X, 0)["params"]["pairs"]
    assert "experts" not in params
    mine = jax.eval_shape(MODEL.init, jax.random.key(0), X, 0)["params"]["pairs"]["experts"]["experts"]
    of_one = sum(k["kernel"].size for k in mine.values()) // 6
    assert 4 * of_one == sum(params["second_channel"][name]["kernel"].size for name in ("in", "out"))


@pytest.mark.parametrize(
    ("model", "task", "says"),
    [
        (MODEL.clone(gate="key"), 0, "gate: got 'key'"),
        (MODEL.clone(pairs=0), 0, "pairs: got 0"),
        (MODEL, 3, "task: got 3; expected a number from 0 to 2"),
    ],
)
def test_bad_input(model, task, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(lambda: model.init(jax.random.key(0), X, task))
