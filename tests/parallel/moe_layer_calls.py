"""Run by test_experts.py on eight devices: a layer and a decoder with experts over a mesh, against one."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import frugax
from frugax.planner.hlo import collectives
from tests.errors import assert_close

MOE = {"experts": 8, "k": 2, "expand": 1}


def layer(**options):
    """A layer that drops, its input, and its loss."""
    model = frugax.layers.MoE(**MOE, dispatch="gather", capacity=1.0, **options)
    return model, jax.random.normal(jax.random.key(0), (4, 6, 8)), lambda y, x: jnp.mean((y - x) ** 2)


def decoder(**options):
    """A decoder of two blocks that drops nothing, its tokens, and its loss."""
    block = frugax.layers.Block("GatedLinearAttention", "MoE", {"heads": 2}, MOE | options)
    model = frugax.layers.Decoder(11, 8, (block,), repeats=2, backend="reference")

    def loss(result, tokens):
        losses = optax.softmax_cross_entropy_with_integer_labels(result[0][:, :-1], tokens[:, 1:])
        return jnp.mean(losses)

    return model, jax.random.randint(jax.random.key(0), (4, 6), 0, 11), loss


def over_time(**options):
    """A layer that drops nothing, its input, and its loss."""
    model = frugax.layers.MoE(**MOE, **options)
    return model, jax.random.normal(jax.random.key(0), (4, 6, 24)), lambda y, x: jnp.mean((y - x) ** 2)


def check(make) -> None:
    """Losses, auxiliary ones too, gradients, and the dropped share, with rows of a batch spread."""

    def step(model, loss):
        def value(params, x):
            result, sown = model.apply({"params": params}, x, mutable=["moe"])
            total = loss(result, x) + 10 * frugax.moe.total_loss(sown)
            return total, frugax.moe.load_summary(sown)

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    one, x, loss = make()
    params = jax.jit(one.init)(jax.random.key(1), x)["params"]
    (value, summary), gradients = step(one, loss)(params, x)
    last = "sequence" if make is over_time else None
    axes = "expert", last or "tensor"
    mesh = frugax.parallel.make_mesh(data=2, expert=2, **{axes[1]: 2})
    split, _, _ = make(expert_axis=axes)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P(frugax.parallel.BATCH_AXES, last)))
        compiled = step(split, loss).lower(params, spread).compile()
        (value_, summary_), gradients_ = compiled(params, spread)
    assert "all-to-all" in compiled.as_text()
    if make is over_time:  # of other devices' tokens those for its experts, and at most the logits of all
        gathered = [c.payload_bytes for c in collectives(compiled.as_text(), mesh) if c.kind == "all-gather"]
        assert max(gathered, default=0) < x.nbytes, gathered
    assert_close((value_, gradients_), (value, gradients), "float32", times=2)
    for name in summary:
        np.testing.assert_allclose(summary_[name], summary[name], atol=1e-5, err_msg=name)
    assert bool(summary["dropped_share"] > 0) == (make is layer)


def check_packed() -> None:
    """Packed experts, each device with the codes and scales of its own, beside one device with all."""
    one, split = (frugax.layers.MoE(**MOE, expert_axis=axes) for axes in (None, ("expert", "tensor")))
    x = jax.random.normal(jax.random.key(0), (4, 6, 32))
    params = jax.jit(one.init)(jax.random.key(1), x)["params"]
    quantize = jax.jit(lambda w: frugax.formats.quantize(w, "int4", axis=1, group_size=32))
    params |= {"experts": {name: {"kernel": quantize(w["kernel"])} for name, w in params["experts"].items()}}
    want = jax.jit(one.apply)({"params": params}, x)
    mesh = frugax.parallel.make_mesh(data=2, expert=2, tensor=2)
    experts = jax.device_put(params["experts"], NamedSharding(mesh, P(("expert", "tensor"))))
    with jax.set_mesh(mesh):
        compiled = jax.jit(split.apply).lower({"params": params | {"experts": experts}}, x).compile()
        got = compiled({"params": params | {"experts": experts}}, x)
    kinds = {c.kind for c in collectives(compiled.as_text(), mesh) if c.payload_bytes > x.nbytes}
    assert "all-gather" not in kinds, "experts travel"
    assert_close(got, want, "float32", times=2)


def check_draws(*axes: str) -> None:
    """In training, jitter, noise and the choice of whom to drop are those of one device.

    Over data and time, with experts here and over the devices of time; or in a stage of a pipeline, whose
    tokens and channels the compiler splits.
    """
    how, in_stage = dict(router="noisy_top_k", jitter=0.2), axes[0] == "pipeline"
    drops = frugax.layers.MoE(**MOE, **how, dispatch="gather", capacity=0.8)
    keeps = {"dispatch": "dense"} if in_stage else {"expert_axis": "sequence"}
    x = jax.random.normal(jax.random.key(0), (4, 6, 24))
    params = jax.jit(drops.init)(jax.random.key(1), x)["params"]

    def value(params, x, key):
        total, dropped = 0.0, []
        for model in (drops, frugax.layers.MoE(**MOE, **how, **keeps)):
            y, sown = model.apply({"params": params}, x, mutable=["moe"], rngs={"router": key})
            total += jnp.mean((y - x) ** 2) + frugax.moe.total_loss(sown)
            dropped.append(sown["moe"]["statistics"]["dropped"])
        return total, jnp.stack(dropped)

    step = jax.value_and_grad(value, has_aux=True)
    want, other = (jax.jit(step)(params, x, jax.random.key(seed)) for seed in (2, 3))
    mesh = frugax.parallel.make_mesh(**dict.fromkeys(axes, 2), devices=jax.devices()[: 2 ** len(axes)])
    if in_stage:
        stage = dict(axis_names={"pipeline"}, in_specs=P(), out_specs=P(), check_vma=False)
        step = jax.shard_map(step, mesh=mesh, **stage)
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P(frugax.parallel.BATCH_AXES, "sequence", "tensor")))
        got = jax.jit(step)(params, spread, jax.random.key(2))
    assert_close(got, want, "float32", times=2)
    assert 0 < float(got[0][1][0]) < 0.5
    assert abs(float(other[0][0]) / float(want[0][0]) - 1) > 1e-3  # another key, other numbers


if __name__ == "__main__":
    if sys.argv[1] == "layer":
        check_packed()
    if sys.argv[1] == "draws":
        check_draws(*sys.argv[2:])
    else:
        check({"layer": layer, "decoder": decoder, "over_time": over_time}[sys.argv[1]])
