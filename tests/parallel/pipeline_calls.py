"""Run by test_pipeline.py on eight devices: pipelines of a decoder, against one device."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import frugax
from experiments.configs.defaults import defaults
from experiments.trainer.parallel import make_layout
from experiments.trainer.pipeline import make_pipeline
from experiments.trainer.state import init_state, make_train_step
from tests.errors import error

Block = frugax.layers.Block
BLOCKS = {
    "dense": Block("GatedLinearAttention", "GLU", {"heads": 2}, {"expand": 2.0}),
    "floors": Block("HGRN2", "GLU", {"heads": 2}, {"expand": 1.0}),
    "experts": Block("MLGRU", "MoE", (), {"experts": 4, "k": 2, "expand": 1.0}),
    "choosing experts": Block(
        "MLGRU", "MoE", (), {"experts": 4, "k": 2, "expand": 1.0, "router": "expert_choice"}
    ),
    "split experts": Block(
        "MLGRU",
        "MoE",
        (),
        {"experts": 4, "k": 2, "expand": 1.0, "router": "sigmoid_top_k", "router_args": {"rate": 0.05}}
        | {"expert_axis": "expert"},
    ),
    "drawing experts": Block(
        "MLGRU",
        "MoE",
        (),
        {"experts": 4, "k": 2, "expand": 1.0, "router": "noisy_top_k", "jitter": 0.2}
        | {"dispatch": "gather", "capacity": 0.8},
    ),
    "pregated": Block("MLGRU", "MoE", (), {"experts": 4, "k": 2, "expand": 1.0}, router_reads="previous"),
    "attention": Block("SlidingWindowAttention", "MLP", {"heads": 2, "window": 5}),
    "mamba": Block("Mamba", None),
}
ROWS, TIME, VOCAB = 2, 7, 32  # rows of a microbatch and tokens of a row, on a device


def config_of(repeats, accumulate, chunks, block="dense", **mesh):
    config = defaults()
    config.mesh.data = 1
    config.mesh.update(mesh)
    rows = config.mesh.data * config.mesh.fsdp * config.mesh.expert
    config.batch_size, config.accumulate = ROWS * rows * accumulate, accumulate
    config.data.sequence_length = TIME * config.mesh.sequence
    config.pipeline.chunks, config.model.repeats = chunks, repeats
    return config


def module_of(config, block, low_bit="", **how):
    how = {"width": 64, "tie_embeddings": True, "backend": "xla"} | how
    decoder = frugax.layers.Decoder(VOCAB, blocks=(BLOCKS[block],), repeats=config.model.repeats, **how)
    config.model.low_bit = low_bit
    return frugax.quant.training.LowBit(decoder, low_bit) if low_bit else decoder


def batch_of(config):
    """Packed documents, and weights that differ."""
    rng = np.random.default_rng(0)
    shape = config.batch_size, config.data.sequence_length
    return {
        "tokens": rng.integers(VOCAB, size=shape).astype(np.int32),
        "targets": rng.integers(VOCAB, size=shape).astype(np.int32),
        "weights": rng.random(shape).astype(np.float32),
        "bytes": np.ones(shape, np.float32),
        "segment_ids": np.sort(rng.integers(3, size=shape).astype(np.int32), axis=1),
    }


def batch_shapes(config, time):
    """Shapes of a batch, to compile for devices that are not here."""
    kinds = jax.tree.map(lambda x: x.dtype, batch_of(config))
    return {name: jax.ShapeDtypeStruct((config.batch_size, time), kind) for name, kind in kinds.items()}


def step_of(config, module, devices=None, shapes=None):
    """The layout, the first state, a batch, and a compiled step whose momentum is the gradients."""
    optimizer = optax.chain(optax.trace(0.0), optax.scale(-0.1))
    layout = make_layout(config, devices)
    init = lambda: init_state(module, optimizer, 0, 0.0)  # noqa: E731
    how = {"accumulate": config.accumulate, "place_grads": layout.place_grads}
    step = make_train_step(module, optimizer, ema_decay=0.0, pipeline=make_pipeline(config, module), **how)
    if shapes is None:
        state, rows = layout.create(init), layout.batch(batch_of(config))
    else:
        state, rows = layout.abstract(init), layout.abstract_batch(shapes)
    return layout, state, rows, layout.compile(step, state, rows)


def compare(block, chunks, accumulate, mesh, how):
    """Loss, metrics, gradients and biases of routers over a mesh are those of one device."""
    with jax.enable_x64(how.get("dtype") == "float64"):
        _compare(block, chunks, accumulate, mesh, how)


def _compare(block, chunks, accumulate, mesh, how):
    repeats = 2 * mesh["pipeline"] * chunks
    results = []
    for sizes in ({}, mesh):
        config = config_of(repeats, accumulate, chunks if sizes else 1, **sizes)
        over_mesh = config_of(repeats, accumulate, chunks, **mesh)
        config.batch_size, config.data = over_mesh.batch_size, over_mesh.data
        layout, state, rows, compiled = step_of(config, module_of(config, block, **how))
        state, metrics = compiled(state, rows)
        state = layout.whole(layout.take(state))
        results.append((jax.device_get(metrics), state.optimizer[0].trace, state.collections))
    (one, want, carried), (many, got, also_carried) = results
    jax.tree.map(np.testing.assert_array_equal, also_carried, carried)
    assert all(map(np.any, jax.tree.leaves(carried)))  # biases moved
    assert sorted(one) == sorted(many), (sorted(one), sorted(many))
    for name in one:
        np.testing.assert_allclose(many[name], one[name], rtol=1e-5, err_msg=name)
    errors = {
        jax.tree_util.keystr(path): error(x, y)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
        if np.abs(y).max() > 0 or np.abs(x).max() > 0
    }
    assert errors
    assert max(errors.values()) < 1e-5, errors
    text = compiled.as_text()
    sends = len(re.findall(r" collective-permute(?:-start)?\(", text))
    assert sends >= 2, sends  # one each way; others are between the parts of a matrix


def memory():
    """1F1B's memory does not grow with M; that of all forward passes first grows by a stage input each, and
    by what the stage's layers carry."""
    stages, width, rows = 2, 64, 32
    mesh = frugax.parallel.make_mesh(pipeline=stages, devices=jax.devices()[:stages])

    def stage(shared, layers, carried, x, microbatch, number):
        after = carried + jnp.sum(x)
        x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer[0] + layer[1]), None), x, (layers, carried))
        return x, 0.0, {}, after

    def used(schedule, parts):
        run = lambda *args: frugax.parallel.pipeline_gradients(  # noqa: E731
            lambda shared, x: x * shared,
            stage,
            lambda shared, x, microbatch: (jnp.sum(x), {}),
            *args,
            carried=jnp.ones((4, rows, width)),
            schedule=schedule,
            mesh=mesh,
        )
        args = jnp.ones(()), jnp.ones((4, width, width)), jnp.ones((parts, rows, width))
        return jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes

    one = rows * width * 4  # bytes of a stage input
    few, many = (used(frugax.parallel.pipeline_schedule(stages, m, in_step=True), m) for m in (4, 16))
    assert many - few < one, (few, many, one)  # the tables alone grow
    few, many = (used(all_forward_first(stages, m), m) for m in (4, 16))
    assert many - few >= 12 * 3 * one, (few, many, one)  # an input, and two layers' carried


def inner():
    """No device has the inner channels of all rows and tokens, in a program where fsdp and sequence, which
    share params too, would have the compiler split channels in a backward pass."""
    config = config_of(4, 2, 1, pipeline=2, fsdp=2, sequence=2)
    *_, compiled = step_of(config, module_of(config, "attention"))
    rows, time, channels = config.batch_size // 2, config.data.sequence_length, 4 * 64
    text = compiled.as_text()
    assert f"f32[{rows // 2},{time // 2},{channels}]" in text
    assert f"[{rows},{time},{channels}]" not in text


def all_forward_first(stages, parts):
    """GPipe's schedule."""
    tasks = frugax.parallel.pipeline_schedule(stages, parts)[0]
    return [sorted(tasks, key=lambda task: (task.direction == "backward", task.microbatch))] * stages


def resume():
    """A state goes from a mesh to another, and on with the losses of one mesh."""
    losses = []
    for meshes in ([{}] * 3, [{"pipeline": 2}, {}, {"pipeline": 2, "fsdp": 2}]):
        whole, found = None, []
        for sizes in meshes:
            config = config_of(4, 4, 2 if sizes else 1, "attention", **sizes)
            config.batch_size = 16
            layout, state, rows, compiled = step_of(config, module_of(config, "attention"))
            if whole is not None:
                state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), whole, state)
            state, metrics = compiled(state, rows)
            whole = layout.whole(layout.take(state))
            found.append(float(metrics["loss"]))
        losses.append(found)
    assert losses[0][0] > losses[0][2]
    np.testing.assert_allclose(*losses, rtol=1e-5)


if __name__ == "__main__":
    for case in map(json.loads, sys.argv[1:]):
        if isinstance(case, str):
            {"memory": memory, "resume": resume, "inner": inner}[case]()
        else:
            compare(*case)
        print(case, "is as on one device")
