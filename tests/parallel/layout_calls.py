"""Run by test_rules.py on eight devices: steps of the trainer over a mesh, against one device."""

import json
import sys

import jax
import numpy as np
import optax

import frugax
from experiments.configs.defaults import defaults
from experiments.trainer.parallel import make_layout
from experiments.trainer.state import init_state, make_train_step
from tests.errors import error

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "galore": lambda: frugax.optim.galore(1e-2, rank=4, update_interval=2),
    "apollo": lambda: frugax.optim.apollo(1e-2, rank=4, update_interval=2),
    "adamw_8bit": lambda: frugax.optim.adamw_8bit(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
}
ROWS, TIME, VOCAB = 8, 12, 32


def batches(steps):
    tokens = np.random.default_rng(0).integers(VOCAB, size=(steps, ROWS, TIME + 1)).astype(np.int32)
    ones = np.ones((ROWS, TIME), np.float32)
    zeros = np.zeros((ROWS, TIME), np.int32)
    for rows in tokens:
        yield {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "weights": ones,
            "bytes": ones,
            "segment_ids": zeros,
        }


def layout_of(**mesh):
    config = defaults()
    config.batch_size = ROWS
    config.mesh.data = 1
    config.mesh.update(mesh)
    return make_layout(config)


BLOCKS = {
    "dense": frugax.layers.Block("GatedLinearAttention", "GLU", {"heads": 2}, {"expand": 2.0}),
    "experts": frugax.layers.Block(
        "MLGRU", "MoE", (), {"experts": 8, "k": 2, "expand": 1.0, "expert_axis": "expert"}
    ),
}


def run(layout, optimizer, steps=3, width=32, block=BLOCKS["dense"]):
    """Losses, this process's copy of the params, the compiled step, and a sum of logits on one device."""
    module = frugax.layers.Decoder(VOCAB, width, (block,), repeats=2, tie_embeddings=False, backend="xla")

    def init():
        return init_state(module, optimizer, 0, 0.9)

    state = layout.create(init)
    step = make_train_step(module, optimizer, accumulate=1, ema_decay=0.9, place_grads=layout.place_grads)
    losses, compiled = [], None
    for rows in batches(steps):
        rows = layout.batch(rows)
        compiled = compiled or layout.compile(step, state, rows)
        state, metrics = compiled(state, rows)
        losses.append(float(metrics["loss"]))
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(layout.abstract(init)), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim), (x.shape, x.sharding, like.sharding)
    params = layout.whole(layout.take(state).params)
    logits, _ = jax.jit(module.apply)({"params": params}, np.zeros((1, TIME), np.int32))
    return losses, params, compiled, float(logits.sum())


def compare(name, mesh, block="dense"):
    optimizer = OPTIMIZERS[name]()
    one, many = (run(layout_of(**m), optimizer, block=BLOCKS[block]) for m in ({}, mesh))
    if block == "experts":
        text = many[2].as_text()
        assert " all-to-all(" in text or " all-to-all-start(" in text
    assert np.isfinite(many[3])  # the module runs on one device as well
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    # Codes of 8 bits flip where a sum's order decides; Muon's and a subspace's iterations amplify it.
    worst = max(jax.tree.leaves(jax.tree.map(error, many[1], one[1])))
    assert worst < (1e-4 if name == "adamw" else 5e-3), worst


def memory():
    """Bytes of a device's state: params P, AdamW's 2 P and an average P; stages share them by eight."""
    sizes = []
    for zero in (0, 1, 2, 3):
        _, params, compiled, _ = run(layout_of(fsdp=8, zero=zero), OPTIMIZERS["adamw"](), steps=1, width=64)
        whole = sum(x.nbytes for x in jax.tree.leaves(params))
        sizes.append(compiled.memory_analysis().argument_size_in_bytes / whole)
    none, optimizer_apart, grads_apart, all_apart = sizes
    assert 4.0 < none < 4.2, sizes
    assert optimizer_apart < 1 + 3 / 8 + 0.3, sizes
    assert abs(grads_apart - optimizer_apart) < 0.01, sizes
    assert all_apart < 4 / 8 + 0.3, sizes


if __name__ == "__main__":
    if sys.argv[1] == "memory":
        memory()
    else:
        compare(sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:])
